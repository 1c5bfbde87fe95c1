"""Send a run to a Slurm cluster.

    python slurm/submit.py --config FILE --nodes N [--profile slurm/profiles/FILE] [--dry-run] [a.b=value …]

Everything that can be known before a node is taken is checked here: the config, its layout against nodes × ranks, the
data's files, the profile. Then a readable sbatch script (slurm/job.sbatch.in, filled in) and the whole checked config
are written into run_dir/slurm/ and submitted: what a requeued job reads weeks later is what was checked today.
"""

import argparse
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pydantic
import yaml

from megatron_mm.config import RunConfig, dump_yaml
from megatron_mm.config.nearest import load_for
from megatron_mm.errors import UserError, run_cli

TEMPLATE = Path(__file__).parent / "job.sbatch.in"

_TIME = re.compile(
    r"(?P<days>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?"  # days-hours[:minutes[:seconds]]
    r"|((?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)"  # [hours:]minutes:seconds
    r"|(?P<only_minutes>\d+)"
)
_TIMES = "minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; in a profile in quotes"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One cluster. Every rank is a Slurm task of its own."""

    partition: str | None = None  # None: the cluster's default
    account: str | None = None
    time: str = "24:00:00"  # of one attempt; the run goes on in the next
    gpus_per_node: int = 0  # 0: a run on CPUs
    tasks_per_node: int | None = None  # None: one a GPU, or one a node without GPUs
    cpus_per_task: int | None = None  # None: the cluster's default; decoding wants about 8
    exclusive: bool = True  # whole nodes
    memory: str = "0"  # a node; "0": all of it
    signal_seconds: int = 300  # before the time limit: a step and a checkpoint must fit in
    max_restarts: int = 100  # attempts after the first, whatever ended them
    python: str | None = None  # None: the one that runs submit.py, or `python` in a container
    container_image: str | None = None  # for srun --container-image (pyxis)
    container_mounts: tuple[str, ...] = ()  # "/outside:/inside[:flags]"; the folder of the job is mounted anyway
    environment: dict[str, str] = field(default_factory=dict)  # NCCL and the like
    setup: tuple[str, ...] = ()  # shell lines before the ranks start: module load …
    sbatch_options: tuple[str, ...] = ()  # "--qos=high", "--constraint=h100", …
    srun_options: tuple[str, ...] = ()

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1


def seconds_of(time: str) -> int:
    """Length of a time limit as Slurm writes it."""
    match = _TIME.fullmatch(time)
    if not match:
        raise UserError("not a time limit that Slurm reads", where="time", found=repr(time), allowed=_TIMES)
    n = {name: int(text or 0) for name, text in match.groupdict().items()}
    hours = 24 * n["days"] + n["h"] + n["hours"]
    minutes = 60 * hours + n["m"] + n["minutes"] + n["only_minutes"]
    return 60 * minutes + n["s"] + n["seconds"]


def load_profile(path: Path | None, options: dict[str, str | int | None]) -> Profile:
    """Read a profile, let `options` that are not None go before it, and check the whole."""
    data = (_read(path) if path else {}) | {name: value for name, value in options.items() if value is not None}
    try:
        # JSON mode, as for the run's config: strict about types, yet a list may fill a tuple.
        checker = pydantic.TypeAdapter(Profile)
        profile = checker.validate_json(json.dumps(data, default=str), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = f"{path}: {'.'.join(str(part) for part in fault['loc'])}"
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            names = ", ".join(f.name for f in dataclasses.fields(Profile))
            raise UserError("unknown field of a profile", where=where, allowed=names) from None
        found, quote = repr(fault["input"]), "put it in quotes" if "string" in fault["type"] else ""
        raise UserError("wrong value in a profile", where=where, found=found, allowed=fault["msg"], do=quote) from None
    _check(profile)
    return profile


def _read(path: Path) -> dict[str, object]:
    where = str(path)
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError("cannot read the profile", where=where, found=error.strerror, do="check --profile") from None
    except yaml.YAMLError as error:
        raise UserError("not valid YAML", where=where, found=str(error)) from None
    if data is not None and not isinstance(data, dict):
        raise UserError("a profile is a mapping of fields", where=where, found=type(data).__name__)
    return data or {}


def _check(p: Profile) -> None:
    least = {"gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "signal_seconds": 1, "max_restarts": 0}
    for name, bound in least.items():
        value = getattr(p, name)
        if value is not None and value < bound:
            raise UserError("out of range", where=name, found=value, allowed=f"{bound} or more")
    if p.signal_seconds > 65535:
        raise UserError("more than Slurm takes", where="signal_seconds", found=p.signal_seconds, allowed="up to 65535")
    if p.gpus_per_node and p.ranks_per_node != p.gpus_per_node:
        raise UserError(
            "every rank has one GPU", where="tasks_per_node", found=f"{p.tasks_per_node}, with {p.gpus_per_node} GPUs",
            do="leave tasks_per_node out",
        )  # fmt: skip
    if seconds_of(p.time) <= p.signal_seconds:
        raise UserError(
            "the time limit leaves no time to train", where="time", found=p.time,
            allowed=f"more than signal_seconds ({p.signal_seconds} s before the limit the run is told to stop)",
        )  # fmt: skip
    if p.container_mounts and not p.container_image:
        raise UserError("there is no container to mount into", where="container_mounts", do="set container_image")
    for name in p.environment:
        if not _VARIABLE.fullmatch(name):
            raise UserError("not a variable's name", where="environment", found=repr(name))
    for name in ("partition", "account", "memory", "python", "container_image"):
        text = getattr(p, name)
        if text is not None and (not text or any(c.isspace() for c in text)):
            raise UserError("empty, or with white space in it", where=name, found=repr(text))
    for name in ("sbatch_options", "srun_options"):
        for option in getattr(p, name):
            if not option.startswith("-") or "\n" in option:
                raise UserError("not an option", where=name, found=repr(option), allowed='like "--qos=high"')


@dataclass(frozen=True)
class Job:
    """All that the sbatch script depends on."""

    profile: Profile
    nodes: int
    run_dir: Path  # absolute
    work_dir: Path  # absolute; where submit.py was called: relative paths in the config start here
    python: str
    number: int  # of this submission of the run

    @property
    def script(self) -> Path:
        return self.run_dir / "slurm" / f"submit-{self.number}.sbatch"

    @property
    def config(self) -> Path:
        return self.run_dir / "slurm" / f"submit-{self.number}.yaml"


def sbatch_lines(job: Job) -> list[str]:
    """The `#SBATCH` options, one a line."""
    p = job.profile
    options: list[tuple[str, object]] = [
        ("job-name", job.run_dir.name),
        ("chdir", job.work_dir),
        ("output", job.run_dir / "slurm" / "%x-%j.out"),
        ("open-mode", "append"),  # else a requeued job empties its log
        ("nodes", job.nodes),
        ("ntasks-per-node", p.ranks_per_node),
        ("gpus-per-node", p.gpus_per_node or None),
        ("cpus-per-task", p.cpus_per_task),
        ("mem", p.memory),
        ("time", p.time),
        ("partition", p.partition),
        ("account", p.account),
        ("signal", f"B:USR1@{p.signal_seconds}"),
        ("dependency", "singleton"),  # two jobs that write into one run_dir would spoil it
    ]
    flags = ["--requeue", *(["--exclusive"] if p.exclusive else []), *p.sbatch_options]
    lines = [f"--{name}={value}" for name, value in options if value is not None] + flags
    return [f"#SBATCH {line}" for line in lines]


def srun_line(job: Job) -> str:
    """One task a rank, a log a rank. One rank's failure ends the others within a minute."""
    p = job.profile
    # MPI plays no part in this start: with --mpi=pmix as the cluster's default the ranks would look for it.
    options = ["--mpi=none", "--kill-on-bad-exit=1", "--wait=60", "--open-mode=append"]
    if p.cpus_per_task:
        options.append(f"--cpus-per-task={p.cpus_per_task}")  # srun no longer takes it from sbatch (22.05 and later)
    if p.container_image:
        mounts = ",".join([f"{job.work_dir}:{job.work_dir}", f"{job.run_dir}:{job.run_dir}", *p.container_mounts])
        options += [f"--container-image={p.container_image}", f"--container-mounts={mounts}"]
        options += [f"--container-workdir={job.work_dir}", "--no-container-mount-home"]
    command = [*map(shlex.quote, [*options, *p.srun_options]), '--output="$rank_logs/rank-%4t.%N.out"']
    ranks = [job.python, "-u", "-m", "megatron_mm.train", "--config", str(job.config)]
    return " \\\n    ".join(["srun", *command, shlex.join(ranks)])


def render(job: Job) -> str:
    """The sbatch script."""
    p = job.profile
    environment = [f"export {name}={shlex.quote(value)}" for name, value in p.environment.items()]
    fields = {
        "SBATCH": "\n".join(sbatch_lines(job)),
        "SCRIPT": str(job.script),
        "RUN_DIR": str(job.run_dir),
        "MAX_RESTARTS": str(p.max_restarts),
        "ENVIRONMENT": "\n".join([*environment, *p.setup]),
        "SRUN": srun_line(job),
    }
    return re.sub(r"@([A-Z_]+)@", lambda match: fields[match[1]], TEMPLATE.read_text())


def plan(arguments: argparse.Namespace) -> tuple[Job, RunConfig]:
    """Check everything; nothing is written yet."""
    names = ("time", "partition", "account", "gpus_per_node", "container_image", "max_restarts")
    profile = load_profile(arguments.profile, {name: getattr(arguments, name) for name in names})
    if arguments.nodes < 1:
        raise UserError("out of range", where="--nodes", found=arguments.nodes, allowed="1 or more")
    config = load_for(arguments.config, arguments.overrides, arguments.nodes * profile.ranks_per_node)
    work_dir, run_dir = Path.cwd(), Path(config.run_dir).absolute()
    for where, path in (("run_dir", run_dir), ("the folder that submit.py was called in", work_dir)):
        if not re.fullmatch(r"[\w./+=@-]+", str(path)):
            raise UserError(
                "goes into Slurm's options and file patterns", where=where, found=str(path),
                allowed="letters, digits and ._+=@-", do="choose another path",
            )  # fmt: skip
    if not profile.container_image:  # a container may have its own paths
        _check_files(config)
    python = profile.python or ("python" if profile.container_image else sys.executable)
    number = 1 + max((int(p.stem[7:]) for p in (run_dir / "slurm").glob("submit-[0-9]*.sbatch")), default=0)
    return Job(profile, arguments.nodes, run_dir, work_dir, python, number), config


def _check_files(config: RunConfig) -> None:
    """A typing error in a path must not wait in the queue for its discovery."""
    files = [("data.tokenizer", config.data.tokenizer)]
    # For object storage this machine may have no keys; the job looks there before it takes a device.
    sources = [(i, s.path) for i, s in enumerate(config.data.sources) if "://" not in s.path]
    files += [(f"data.sources.{i}.path", f"{path}.manifest.json") for i, path in sources]
    for where, file in files:
        if not Path(file).exists():  # a tokenizer may be a folder
            raise UserError("no such file", where=where, found=file, do="check the path, or make it with tools/")


def submit(job: Job, config: RunConfig) -> int:
    """Write script and config, call sbatch, and answer with the job's number."""
    job.script.parent.mkdir(parents=True, exist_ok=True)
    job.config.write_text(dump_yaml(config))
    job.script.write_text(render(job))
    done = subprocess.run(["sbatch", "--parsable", str(job.script)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        job.script.unlink()
        job.config.unlink()
        raise UserError("sbatch refused the job", found=done.stderr.strip(), do="change the profile; see also sinfo")
    return int(done.stdout.split(";")[0])  # "JOB" or "JOB;CLUSTER"


def main() -> int:
    parser = argparse.ArgumentParser(prog="submit.py", description=__doc__.splitlines()[0], epilog="see docs/slurm.md")
    parser.add_argument("--config", required=True, help="a run as YAML")
    parser.add_argument("--nodes", required=True, type=int)
    parser.add_argument("--profile", type=Path, help="the cluster, as YAML; see slurm/profiles/")
    parser.add_argument("--gpus-per-node", type=int, help="also the ranks a node; 0: one rank a node, on its CPUs")
    parser.add_argument("--time", help="limit of one attempt, as Slurm writes it: 30, 12:00:00, 2-00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--container-image", help="for srun --container-image (pyxis)")
    parser.add_argument("--max-restarts", type=int, help="attempts after the first")
    parser.add_argument("--dry-run", action="store_true", help="check, print the script, write and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="fields of the config to change")
    arguments = parser.parse_args()
    job, config = plan(arguments)
    if arguments.dry_run:
        print(render(job), end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch on this machine", do="run this on the cluster's login node, or use --dry-run")
    number = submit(job, config)
    logs = job.run_dir / "slurm" / f"{job.run_dir.name}-{number}"
    print(f"job {number}: {job.nodes} nodes × {job.profile.ranks_per_node} ranks")
    print(f"script      {job.script}")
    print(f"batch log   {logs}.out")
    print(f"rank logs   {logs}.ATTEMPT/rank-RANK.NODE.out")
    return 0


if __name__ == "__main__":
    run_cli(main)
