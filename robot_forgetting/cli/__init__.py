"""The command line: parsing, building what it names, errors in one line."""


def __getattr__(name: str):
    if name != "main":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from robot_forgetting.cli.command_line import main  # late: `python -m robot_forgetting.cli.keys` begins here too

    return main
