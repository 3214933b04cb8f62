"""How a sub-command says that the user can mend something."""


class CommandError(Exception):
    """A mistake that the user can mend: its message goes to stderr and the command ends with exit code 2."""
