"""The error of a sub-command that the user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    r"""Return a text from a file with what would steer a terminal written out, such as ``\x1b`` or ``\u202e``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class CommandError(Exception):
    """A mistake that the user can mend: its message goes to stderr and the command ends with exit code 2."""


@contextmanager
def as_command_error() -> Iterator[None]:
    """Raise `CommandError` for what the library raises on bad input, missing files and refusals of the Hub."""
    from huggingface_hub.errors import HTTPError

    from mfac_hf.hub.push import PushError

    try:
        yield
    except (OSError, ValueError, PushError, ImportError, HTTPError) as error:
        line = " ".join(str(error).split())  # messages of the Hub take several
        raise CommandError(printable(line)) from error
