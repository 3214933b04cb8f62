"""`mfac card` writes a model card from result files and weights.

    mfac card --model outputs/sst2-90 --results outputs/sst2-90*/results.json --dense outputs/dense*/results.json \
        --caveats caveats.yaml --output model_cards/sst2-90
    mfac card --facts model_cards/sst2-90/card.json          # the same card again, from its facts alone

It writes the facts to ``card.json``, and the card, made from these facts alone, to ``README.md`` beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mfac_hf.cli.errors import CommandError, as_command_error
from mfac_hf.storage import read_json, read_yaml, write_text, written_aside


def add_parser(commands: Any) -> None:
    """Add `mfac card` to the sub-commands."""
    card = commands.add_parser(
        "card",
        help="write a model card from result files and weights",
        description="Write card.json (what was measured) and README.md (the card made from it).",
    )
    source = card.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--facts", type=Path, metavar="FILE", help="card.json of an earlier call; writes README.md beside it again"
    )
    source.add_argument(
        "--model", type=Path, metavar="DIR", help="directory with the weights of the first result file"
    )
    add_fact_arguments(card)
    card.add_argument(
        "--output", type=Path, metavar="DIR", help="where both files go (default: the directory of the model)"
    )
    card.add_argument(
        "--repo_id", help="name on the Hub that the code in the card loads (default: the name of the model)"
    )
    card.set_defaults(run=_run_card)


def add_fact_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the sources of a card's facts."""
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="result files, one for each seed; the first is that of the weights (default: results.json beside them, "
        "or pruning.json)",
    )
    parser.add_argument(
        "--dense", type=Path, nargs="+", default=[], metavar="FILE", help="result files of the model before pruning"
    )
    parser.add_argument(
        "--caveats",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML files, each a list of sentences that readers have to know about data and weights",
    )
    parser.add_argument("--license", help="licence identifier of the weights, such as apache-2.0")
    parser.add_argument("--name", help="name of the model (default: that of its directory)")
    parser.add_argument(
        "--model_class", metavar="CLASS", help="package.module.Class, where config.json names no class of transformers"
    )
    parser.add_argument("--no_latency", action="store_true", help="do not time a forward pass on this machine")


def _run_card(arguments: argparse.Namespace) -> None:
    from mfac_hf.hub.card import build_card, check_facts

    with as_command_error():
        if arguments.facts is not None:
            facts = read_json(arguments.facts)
            check_facts(facts, str(arguments.facts))
            folder = arguments.output or arguments.facts.parent
        else:
            facts = collect_facts(arguments, arguments.model)
            folder = arguments.output or arguments.model
        card = build_card(facts, arguments.repo_id)
        if arguments.facts is not None:
            write_text(folder / "README.md", str(card))
        else:
            # Both are complete before the first takes its name.
            with written_aside(folder / "card.json") as facts_file, written_aside(folder / "README.md") as card_file:
                facts_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
                card_file.write_text(str(card), encoding="utf-8")
    print(folder / "README.md")


def collect_facts(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Gather the facts that the flags point to."""
    from mfac_hf.hub.facts import CardOptions, collect
    from mfac_hf.hub.latency import with_latency

    results = arguments.results
    if results is None:
        results = [path for name in ("results.json", "pruning.json") if (path := model / name).is_file()][:1]
        if not results:
            raise CommandError(
                f"--results is missing, and {model / 'results.json'} is no file (nor pruning.json, which mfac prune "
                "writes)"
            )
    options = CardOptions(
        name=arguments.name,
        model_class=arguments.model_class,
        dense=arguments.dense,
        caveats=[text for path in arguments.caveats for text in _read_caveats(path)],
        license=arguments.license,
    )
    facts = collect(results, model=model, options=options)
    return facts if arguments.no_latency else with_latency(facts, model)


def _read_caveats(path: Path) -> list[str]:
    caveats = read_yaml(path)
    if not isinstance(caveats, list) or not all(isinstance(text, str) for text in caveats):
        raise CommandError(f"--caveats {path}: expected a YAML list of sentences")
    return caveats
