"""A process that has imported what ranks import, and forks them: a rank of a test starts at once, not after 4 seconds.

    python -m tests.rank_server          (`ranks.py` starts one for each number of a rank, so that hash seeds differ)

Reads one JSON a line, {"command": [SCRIPT, …], "env": {…}, "log": FILE}, and answers {"pid": N}; tells of each rank's
end, {"ended": N, "code": C}. When its input ends it kills the ranks that are left.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import tests.parallel.some_steps  # noqa: F401 (brings torch, Megatron-Core and the package)

_LOOK = 0.02  # seconds between looks for ranks that have ended


def tell(**message: int) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def become_rank(request: dict[str, Any]) -> NoReturn:
    """In the forked process: run the script as if it had been started alone."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"])
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    living: set[int] = set()
    left = b""
    while True:
        if select.select([0], [], [], _LOOK if living else None)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, left = (left + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if not pid:
                    become_rank(json.loads(line))
                living.add(pid)
                tell(pid=pid)
        for pid in sorted(living):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                living.remove(pid)
                tell(ended=pid, code=os.waitstatus_to_exitcode(status))
    for pid in living:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
