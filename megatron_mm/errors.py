"""The one exception that users see, and the wrapper that prints it without a traceback.

`UserError` is for what the user can mend: a wrong field, a missing file, a layout that does not divide.
Anything else is a bug of ours and keeps its traceback.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """One clear error: what is wrong, where, what was found, what is allowed, what to do.

    Args:
        what: the fault in one line.
        where: the config field (`parallel.tensor_model_parallel_size`) or the file.
        found: the value or state that was met.
        allowed: what would have been accepted.
        do: the next step for the user.

    `everywhere` is set once all ranks of a run are known to raise the error: then one of them tells it.
    """

    everywhere = False

    def __init__(self, what: str, *, where: str = "", found: object = None, allowed: str = "", do: str = "") -> None:
        self.what, self.where, self.found, self.allowed, self.do = what, where, found, allowed, do
        lines = [f"{where}: {what}" if where else what]
        if found is not None:
            lines.append(f"  found:   {found}")
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if do:
            lines.append(f"  do:      {do}")
        super().__init__("\n".join(lines))


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command's `main`; a UserError becomes a message on stderr and exit code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(code or 0)
