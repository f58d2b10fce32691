"""A script that starts worker processes is read again by each of them."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

from robot_forgetting.errors import UserError


def check_script(call: str) -> None:
    """``UserError`` where the script that makes this call cannot be read again, or would make the call again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            f"this script calls {call} again in each worker process; put the call below `if __name__ == '__main__':`"
        )
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None and not Path(script).exists():
        raise UserError(
            f"worker processes read the script again that calls {call}, and {Path(script).name} cannot be read twice; "
            "write it into a file, and the call below `if __name__ == '__main__':`"
        )
