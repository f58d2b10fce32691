"""Whatever goes wrong on the command line, as one line that names the problem and the fix."""

from __future__ import annotations

import os
import sys
import traceback

from robot_forgetting.errors import UserError, blamed, located, one_line


def complain(error: BaseException, debug: bool, where: str = "") -> int:
    """Prints an error as one line, which says where in a sweep it happened; returns the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader has gone (`| head`): nothing to say, and nobody to hear it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if debug:
        traceback.print_exception(error)
    more = "" if debug else "; debug=true shows the traceback"
    if isinstance(error, UserError):
        code, message = 2, one_line(error)
    elif (line := blamed(error)) is not None:
        code, message = 2, f"{line}; debug=true shows the traceback"
    else:
        code, message = 1, f"{located(error)}{more}"
    print(f"error: {where}{message}", file=sys.stderr)
    return code
