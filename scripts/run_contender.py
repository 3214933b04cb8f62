"""Train with an optimizer of another package: ``python scripts/run_contender.py SCRIPT --contender soap``.

    python scripts/run_contender.py run_glue.py --contender soap --contender_options '{"precondition_frequency": 5}' \
        --model_name_or_path MODEL --task_name sst2 --do_train --do_eval --learning_rate 3e-3 --output_dir outputs/soap

SCRIPT is one of this folder whose main function takes ``make_optimizer``; all other flags are its own. The contenders
are those of `scripts/comparison/contenders.py`. ``results.json`` knows nothing of them: it is for
`compare_optimizers.py`, whose log has the flags of each run.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.contenders import CONTENDERS, contender_maker


def main(argv: Sequence[str] | None = None) -> Any:
    """Run the script with the contender, and return what its main function returns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("script", help="file name of the script")
    parser.add_argument("--contender", required=True, choices=list(CONTENDERS), help="the optimizer")
    parser.add_argument("--contender_options", default="{}", type=json.loads, help="its options, as JSON")
    args, flags = parser.parse_known_args(argv)
    if not isinstance(args.contender_options, dict):
        parser.error(f'--contender_options {args.contender_options!r}: expected an object, such as {{"name": 1}}')
    if not (Path(__file__).parent / args.script).is_file():
        parser.error(f"{args.script} is no script of {Path(__file__).parent}")
    script = importlib.import_module(Path(args.script).stem)
    if "make_optimizer" not in inspect.signature(script.main).parameters:
        parser.error(f"{args.script} makes its optimizer itself: its main function takes no make_optimizer")
    # Without a learning rate, AdamW's default rather than M-FAC's.
    return script.main(
        [*flags, "--optim_name", "adamw"], make_optimizer=contender_maker(args.contender, args.contender_options)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
