"""A real Slurm on this machine: munged, slurmctld and some slurmd, without root's files, systemd or cgroups.

    with SlurmCluster(folder, nodes=2) as cluster:
        cluster.run("sbatch", "--wrap=hostname")

Nodes are named 127.0.0.1, 127.0.0.2, …: Slurm's names for them are then addresses that ranks can meet at, though all
live on one host. Nothing outlives the `with`: daemons and whatever they started carry this cluster's SLURM_CONF.
"""

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from megatron_mm.parallel.launch import free_port
from tests.ranks import rank_environment

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")

CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its credential has run out: 5 s instead of two minutes.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=1
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobRequeue=1
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
# Ranks meet at a port that comes from the job's number: another suite's cluster on this machine should have others.
# Two digits at most: they are part of what MPICH says to mpi/pmi2, which takes no more than 1024 characters at once.
FirstJobId={first_job}
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=1-0 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=1-0 State=UP PriorityTier=100 PreemptMode=OFF
"""


class SlurmCluster:
    """`nodes` nodes of 4 CPUs and `gpus` GPUs that are links to /dev/null. All state lives in `folder`."""

    def __init__(self, folder: Path, nodes: int = 2, gpus: int = 2) -> None:
        missing = [c for c in (*DAEMONS, *COMMANDS) if shutil.which(c, path=_search_path()) is None]
        if missing:
            raise RuntimeError(
                f"the Slurm tests need {', '.join(missing)}. On Debian or Ubuntu: "
                "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
            )
        self.folder, self.conf = folder.resolve(), folder.resolve() / "slurm.conf"
        self.names = [f"127.0.0.{i + 1}" for i in range(nodes)]
        self._daemons: list[subprocess.Popen[bytes]] = []
        # What a user's shell would have; also what the daemons hand on to nobody.
        self.env = rank_environment(SLURM_CONF=str(self.conf), PATH=_search_path())
        self._configure(gpus)

    def _configure(self, gpus: int) -> None:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        for gpu in range(gpus):
            (self.folder / f"gpu{gpu}").symlink_to("/dev/null")
        different: set[int] = set()
        while len(different) <= len(self.names):
            different.add(free_port())
        port, *ports = different
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={p} CPUs=4 RealMemory=4000 Gres=gpu:{gpus}"
            for name, p in zip(self.names, ports, strict=True)
        )
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName={','.join(self.names)} Name=gpu File={self.folder}/gpu[0-{gpus - 1}]\n"
        )
        host = socket.gethostname().split(".")[0]
        conf = CONF.format(
            host=host, port=port, user=getpass.getuser(), folder=self.folder, nodes=nodes,
            first_job=random.SystemRandom().randrange(1, 60),
        )  # fmt: skip
        self.conf.write_text(conf)

    def __enter__(self) -> "SlurmCluster":
        try:
            socket_path = self.folder / "munge.sock"
            # --force: pytest's folders are closed to other users, of whom munged thinks.
            self._spawn(
                "munged", "-F", "--force", "-S", str(socket_path), "--num-threads=2",
                f"--key-file={self.folder}/munge.key", f"--log-file={self.folder}/munged.log",
                f"--pid-file={self.folder}/munged.pid", f"--seed-file={self.folder}/munge.seed",
            )  # fmt: skip
            self.wait(socket_path.exists, 10, "munged's socket", self._daemons_log)
            self._spawn("slurmctld", "-D", "-c", "-f", str(self.conf))
            for name in self.names:
                self._spawn("slurmd", "-D", "-N", name, "-f", str(self.conf))
            self.wait(self._all_idle, 30, "idle nodes", self._daemons_log)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def _spawn(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            daemon = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._daemons.append(daemon)

    def _all_idle(self) -> bool:
        if dead := [d for d in self._daemons if d.poll() is not None]:
            raise RuntimeError(f"{dead[0].args!r} has ended\n{self._daemons_log()}")
        states = self._try("sinfo", "-h", "-p", "batch", "-N", "-o", "%T").stdout.split()
        return states == ["idle"] * len(self.names)

    def _daemons_log(self) -> str:
        return (self.folder / "daemons.log").read_text(errors="replace")[-4000:]

    def _stop(self) -> None:
        """Daemons in the reverse order of their start, then what is left of steps and tasks."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self) -> list[int]:
        """All processes that carry this cluster's SLURM_CONF, this one aside."""
        tag, found = f"SLURM_CONF={self.conf}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if tag in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # ended, or another user's
        return [pid for pid in found if pid != os.getpid()]

    def _try(self, *command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        return subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=180)

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """A command in the cluster's environment; answers with stdout, fails with stderr."""
        done = self._try(*command, cwd=cwd)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says: {"JobState": "RUNNING", "Restarts": "0", "NodeList": …}."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", str(number))))

    def wait(self, ready: Callable[[], bool], timeout: float, what: str, log: Callable[[], str] = str) -> None:
        """Poll until `ready`; after `timeout` seconds fail with `what` was awaited and what `log` has to say."""
        end = time.monotonic() + timeout
        while not ready():
            assert time.monotonic() < end, f"waited {timeout} s for {what}\n{log()}"
            time.sleep(0.1)

    def wait_for_state(self, number: int, state: str, timeout: float, log: Callable[[], str] = str) -> dict[str, str]:
        """Poll until job `number` is in `state`; fails at once if it ends in another."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"} - {state}

        def ready() -> bool:
            now = self.job(number)["JobState"]
            assert now not in over, f"job {number} is {now}, not {state}\n{log()}"
            return now == state

        self.wait(ready, timeout, f"job {number} to be {state}", log)
        return self.job(number)

    def cancel_all(self) -> None:
        """Empty the queue and wait for idle nodes, for the next test."""
        for line in self.run("squeue", "-h", "-o", "%A").split():
            self._try("scancel", line)
        for name in self.names:
            self._try("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self.wait(self._all_idle, 60, "idle nodes after cancelling all jobs")


def _search_path() -> str:
    """Debian keeps daemons where a user's PATH does not look."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
