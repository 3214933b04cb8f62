"""The whole story in three minutes: ``python scripts/demo.py``.

1. A small BERT learns the generated sentiment task of `mfac_hf.tasks.toy`, where word order decides and counting words
   does not help: with AdamW, and with M-FAC at AdamW's learning rate. Both start from the same weights and see the
   same batches under the same schedule. The rate is AdamW's best (``benchmarks/studies/demo-rates.yaml``).
2. M-FAC's model is pruned while it is trained on: by magnitude, and by M-FAC. Nothing is tuned on either side.
3. The pruned model is saved as a sparse file, loaded again and compared.

Nothing is downloaded. A table and what follows from it are printed; ``--output_dir`` gets results.json, the saved
model and, where matplotlib is installed, demo.png. ``--seeds 1`` takes a third of the time.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from story.report import LABELS, draw, find, make_table
from story.runs import DemoArguments, load_task, prune, save, train, training_arguments

from mfac_hf.hub.run_records import write_results
from mfac_hf.tasks.toy import LABEL_NAMES, toy_dataset
from mfac_hf.training.arguments import parse_args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, prune and save; print what came out, write it down, and return it."""
    started = time.perf_counter()
    args: DemoArguments = parse_args(DemoArguments, argv=argv, description=__doc__)[0]
    console = Console()
    console.print("Some sentences of the task:")
    for row in toy_dataset(6, 1, seed=args.seed)["train"]:
        console.print(f"  {LABEL_NAMES[row['label']]}: {row['sentence']}", soft_wrap=True)
    trainings, prunings, files = [], [], None
    for seed in range(args.seed, args.seed + args.seeds):
        task = load_task(seed, args)
        for name in ("adamw", "mfac"):
            console.print(f"{LABELS[name]}, seed {seed}")
            training, trained = train(name, seed, task, args)
            trainings.append(training)
        for method in ("magnitude", "mfac"):
            console.print(f"pruning M-FAC's model by {LABELS[method]}, seed {seed}")
            pruning, pruned = prune(method, seed, task, trained, args)
            prunings.append(pruning)
        files = files or save(seed, task, pruned, args)
    assert files is not None
    findings = find(trainings, prunings, files)
    results = {
        "trainings": [asdict(run) for run in trainings],
        "prunings": [asdict(run) for run in prunings],
        "files": asdict(files),
        "findings": findings,
    }
    console.print(make_table(trainings, prunings, files), *findings, sep="\n", soft_wrap=True)
    settings = training_arguments(args.seed, args.steps, 1, args)
    path = write_results(args.output_dir, results, arguments=[args, settings], argv=argv, started=started)
    console.print(f"results: {path}", soft_wrap=True)
    picture = Path(args.output_dir) / "demo.png"
    if draw(trainings, prunings, files, picture):
        console.print(f"picture: {picture}", soft_wrap=True)
    return results


if __name__ == "__main__":
    # Two threads were seen to take 20 times as long as one where the machine had other work to do: they wait for each
    # other after every small operation.
    torch.set_num_threads(1)
    main()
