"""`mfac push` uploads a model with its card to the Hub, in one commit.

mfac push outputs/sst2-90 user/sst2-90 --card outputs/sst2-90/card.json
mfac push outputs/sst2-90 user/sst2-90 --results outputs/sst2-90*/results.json --dense outputs/dense*/results.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mfac_hf.cli.card import add_fact_arguments, collect_facts
from mfac_hf.cli.errors import as_command_error


def add_parser(commands: Any) -> None:
    """Add `mfac push` to the sub-commands."""
    push = commands.add_parser(
        "push",
        help="upload a model with its card to the Hub",
        description="Upload weights, configuration, tokenizer and a card made from results, in one commit.",
    )
    push.add_argument("model", type=Path, help="directory of a model, as save_pretrained or save_sparse wrote it")
    push.add_argument("repo_id", help="user/name of the repository; made if missing")
    push.add_argument(
        "--card",
        type=Path,
        metavar="FILE",
        help="card.json that `mfac card` wrote; the flags for its sources then do nothing",
    )
    add_fact_arguments(push)
    push.add_argument(
        "--private", action="store_true", help="make the new repository private; refused for one that is public"
    )
    push.add_argument("--revision", help="branch to commit to; made if missing (default: main)")
    push.add_argument(
        "--sparse_only",
        "--sparse-only",
        action="store_true",
        help="upload the sparse file without the ordinary one",
    )
    push.set_defaults(run=_run_push)


def _run_push(arguments: argparse.Namespace) -> None:
    from mfac_hf.hub.push import push_to_hub

    with as_command_error():
        if arguments.card is None:
            arguments.name = arguments.name or arguments.repo_id.rpartition("/")[2]
        commit = push_to_hub(
            arguments.model,
            arguments.repo_id,
            card=arguments.card if arguments.card is not None else collect_facts(arguments, arguments.model),
            private=arguments.private or None,
            revision=arguments.revision,
            sparse_only=arguments.sparse_only,
        )
    print(commit.commit_url)
