"""The one exception a user is meant to see: a line that names the problem and the fix."""


class UserError(Exception):
    """A bad input or a broken machine. The command line prints it as one line and exits with code 2."""


class Diverged(UserError):
    """A loss that is no longer a finite number."""


def unknown(kind: str, name: object, choices) -> UserError:
    """A ``UserError`` for a name that does not exist, listing those that do."""
    return UserError(f"unknown {kind} '{name}'; choose one of: {', '.join(sorted(map(str, choices)))}")
