"""The `mfac` command: each sub-command has a module, which adds its parser and runs it.

A sub-command imports torch and the Hugging Face libraries when it runs: `mfac --help` stays quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mfac_hf.cli import card, env, estimate, export, inspect, prune, push
from mfac_hf.cli.errors import CommandError

__all__ = ["CommandError", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `mfac` command.

    Args:
        argv: the arguments after the program's name; those of the process when None.

    Returns:
        The exit code: 0, or 2 after a `CommandError`.

    Raises:
        SystemExit: from argparse, with code 2 for unknown arguments and 0 after `--help`.
    """
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    arguments = _parser().parse_args(argv)
    arguments.argv = argv  # a sub-command records how it was called
    try:
        arguments.run(arguments)
    except CommandError as error:
        print(f"mfac {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    """Build the parser; a sub-command is a sub-parser whose default `run` takes the parsed arguments."""
    parser = argparse.ArgumentParser(prog="mfac", description="M-FAC for Hugging Face transformers.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (env, estimate, inspect, prune, card, push, export):
        module.add_parser(commands)
    return parser
