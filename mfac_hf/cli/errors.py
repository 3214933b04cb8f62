"""How a sub-command says that the user can mend something."""

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """A mistake that the user can mend: its message goes to stderr and the command ends with exit code 2."""


@contextmanager
def mendable() -> Iterator[None]:
    """Turn what the library raises for bad input, missing files or a refusing Hub into a `CommandError`."""
    from huggingface_hub.errors import HTTPError

    from mfac_hf.hub.push import PushError

    try:
        yield
    except (OSError, ValueError, PushError, ImportError, HTTPError) as error:
        raise CommandError(" ".join(str(error).split())) from error  # messages of the Hub take several lines
