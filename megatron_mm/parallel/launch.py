"""How this process was started, as one answer for torchrun, srun, mpiexec and a plain `python`.

    world = launch()    # Launch(rank=3, world_size=16, local_rank=3, local_world_size=8, kind="slurm")

`launch` reads the launcher's variables and sets the ones that torch's `env://` initialisation wants, so that all code
after it is the same under every launcher. The order of the questions matters:

    RANK                               torchrun, or anyone who sets torch's variables; also torchrun under srun
    OMPI_COMM_WORLD_*, PMI_*, PMIX_*   mpiexec, or srun --mpi=pmi2|pmix; before SLURM_*, since mpiexec inside a job
                                       hands its ranks the batch shell's own SLURM_PROCID=0
    SLURM_PROCID in a job step         srun; a batch or salloc shell is no step, hence a single process
    none of them                       a single process
"""

import os
import random
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from megatron_mm.errors import UserError

_LOOPBACK = "127.0.0.1"
# Below Linux's ephemeral ports (32768 and up), which outgoing connections take at random.
_FIRST_PORT, _PORTS = 20000, 12000


@dataclass(frozen=True)
class Launch:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this node; the number of its GPU
    local_world_size: int
    kind: Literal["torchrun", "mpi", "slurm", "single"]


def launch() -> Launch:
    """Detect the launcher and set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    A MASTER_ADDR or MASTER_PORT that is set already is kept. Under MPI this is collective: every rank must call it.

    Raises:
        UserError: the launcher's variables are incomplete, mpi4py is missing under mpiexec, or the MPI library does
            not belong to the launcher, so that every rank would take itself for the only one.
    """
    if "RANK" in os.environ:
        return _torchrun()
    if mpi_variable := next((v for v in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK") if v in os.environ), None):
        return _mpi(mpi_variable)
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        return _slurm()
    return _publish(Launch(0, 1, 0, 1, "single"), _LOOPBACK, free_port())


def _torchrun() -> Launch:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                "RANK is set, but not where rank 0 is to be met", where=name, found="no such variable",
                do="start with torchrun, set all of torch's variables, or unset RANK",
            )  # fmt: skip
    rank, world_size, local_rank = _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK")
    return Launch(rank, world_size, local_rank, _number("LOCAL_WORLD_SIZE"), "torchrun")


def _slurm() -> Launch:
    """One task a rank. All ranks compute the same address and port, without a word between them."""
    node, tasks_per_node = _number("SLURM_NODEID"), _expand_counts(_text("SLURM_STEP_TASKS_PER_NODE"))
    if node >= len(tasks_per_node):
        raise UserError(
            "srun's variables disagree", where="SLURM_NODEID", found=node, allowed=f"0 to {len(tasks_per_node) - 1}",
            do="start the ranks with one srun",
        )  # fmt: skip
    # A requeued job and a job's next step must not meet a port that the one before has not let go yet.
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    port = _FIRST_PORT + (37 * _number("SLURM_JOB_ID") + _number("SLURM_STEP_ID") + restarts) % _PORTS
    rank, world_size, local_rank = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_LOCALID")
    world = Launch(rank, world_size, local_rank, tasks_per_node[node], "slurm")
    return _publish(world, _first_host(_text("SLURM_STEP_NODELIST")), port)


def _mpi(variable: str) -> Launch:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, an MPI library is not
        raise UserError(
            "started by mpiexec (or srun --mpi=…), which needs mpi4py and an MPI library", where=variable,
            found=str(error).splitlines()[0],
            do="pip install 'megatron-mm[mpi]' with the cluster's MPI loaded; or use srun --mpi=none or torchrun",
        ) from None  # fmt: skip
    world = MPI.COMM_WORLD
    sizes = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    size = next((v for v in sizes if v in os.environ), None)
    if size and world.size != _number(size):
        raise UserError(
            "the MPI library does not belong to the launcher: every process takes itself for a run of its own",
            where=size, found=f"{os.environ[size]} processes started, {world.size} seen by {MPI.get_vendor()[0]}",
            do="use the mpiexec of the MPI that mpi4py loads; under srun try --mpi=pmi2, --mpi=pmix or --mpi=none",
        )  # fmt: skip
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    # Rank 0's own address as the others see it; on one node the loopback always works, names may not resolve.
    host = _LOOPBACK if node.size == world.size else os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    here = (os.environ.get("MASTER_ADDR", host), int(os.environ.get("MASTER_PORT") or free_port()))
    address, port = world.bcast(here if world.rank == 0 else None)
    result = _publish(Launch(world.rank, world.size, node.rank, node.size, "mpi"), address, port)
    node.Free()
    return result


def _publish(world: Launch, address: str, port: int) -> Launch:
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.world_size),
        LOCAL_RANK=str(world.local_rank), LOCAL_WORLD_SIZE=str(world.local_world_size),
    )  # fmt: skip
    return world


def _text(name: str) -> str:
    if name not in os.environ:
        raise UserError("the launcher did not set this variable", where=name, do="start with torchrun, srun or mpiexec")
    return os.environ[name]


def _number(name: str) -> int:
    text = _text(name)
    if not text.isascii() or not text.isdigit():
        raise UserError("the launcher's variable is not a whole number", where=name, found=repr(text))
    return int(text)


def _expand_counts(text: str) -> list[int]:
    """Slurm's shorthand for tasks a node: "8(x3),4" is [8, 8, 8, 4]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            where = "SLURM_STEP_TASKS_PER_NODE"
            raise UserError("not a list of tasks a node", where=where, found=repr(text), allowed="like 8(x3),4")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first_host(nodes: str) -> str:
    """First of a Slurm host list, where task 0 runs: "gpu[007-010,12],cpu1" is gpu007. (No scontrol in containers.)"""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # the pattern matches the empty string too
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def free_port() -> int:
    """One that nobody holds on any of this machine's addresses, and that is no Slurm step's (`_slurm`)."""
    while True:
        port = random.SystemRandom().randrange(10_000, _FIRST_PORT)  # whatever seed the program has set
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
