r"""Train a vision model: ``python scripts/train_vision.py --model resnet20 --dataset DATASET --optim mfac``.

It trains CIFAR ResNets, Wide ResNets and MobileNetV1 with SGD, Adam, AdamW or M-FAC, through the flags of the M-FAC
paper's own script. DATASET is ``cifar10``, a name on the Hub, a local directory laid out like the Hub repository, or a
folder of images; without it, the data are scikit-learn's digits, which need no download:

    python scripts/train_vision.py --model resnet20 --dataset DATASET --optim mfac --ngrads 512 --weightdecay .003 \
        --batchsize 128 --save rn20-mfac.pth
    python scripts/train_vision.py --model resnet20 --optim mfac --nepochs 3
    python scripts/train_vision.py --model resnet20 --optim mfac --metric adam --nepochs 3
    python scripts/train_vision.py --model resnet20 --dataset cifar10 --checkpoint pruned.pth --sparse --optim mfac

``--optim mfac`` is the optimizer of the paper; with ``--metric adam`` it is what `mfac_hf.MFAC` is by default. The
last call trains only the survivors of a pruned checkpoint, and M-FAC's window holds nothing else. Under ``accelerate
launch`` several processes share the work. After each epoch the model is written to the file ``--save``, and accuracy
and time to files beside it that end in ``.csv`` and ``.json``. ``--resume`` continues a run that was cut off, and ends
with the same weights to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mfac_hf.machine import describe_run
from mfac_hf.storage import write_json
from mfac_hf.training.arguments import flag, parse_args
from mfac_hf.training.curve import LossCurve
from mfac_hf.training.vision_arguments import (
    VisionArguments,
    build_optimizer,
    build_run,
    model_state,
    set_learning_rate,
    sparse_masks,
)
from mfac_hf.training.vision_run import RunLog, VisionRun, learning_rate_plan, load_state
from mfac_hf.training.vision_window import resume_optimizer, save_state

# Epochs and drops of the M-FAC paper's script, by the first letters of the model.
_PLANS = {"resnet": (164, [82, 123]), "wideresnet": (200, [100, 150]), "mobilenet": (100, [50, 75])}
CURVE_ENTRIES = 100  # of the whole run
_LEARNING_RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "mfac": 1e-3}


@dataclass
class TrainArguments(VisionArguments):
    """Flags of this script."""

    optim: Literal["sgd", "adam", "adamw", "mfac"] = flag("mfac", "Optimizer.")
    lr: float | None = flag(None, "Learning rate; default: .1 for sgd, else .001.")
    momentum: float | None = flag(
        None,
        "Decay of the average of gradients (sgd; default: .9) or of directions (mfac --metric identity; default: 0).",
    )
    nepochs: int | None = flag(
        None,
        "Epochs; default: 164 with drops at 82 and 123; Wide ResNet 200 (100, 150), MobileNet 100 (50, 75).",
    )
    sparse: bool = flag(
        False, "Train only the weights that the checkpoint's masks keep or, without masks, those that are not zero."
    )
    save: str = flag("trained.pth", "File of the model after the latest epoch.")
    results: str | None = flag(
        None, "File of results as run_glue.py writes them, with the test loss and the curve of the training loss."
    )

    def plan(self) -> list[float]:
        """Learning rate of each epoch.

        Raises:
            ValueError: there is no epoch, or a drop lies outside the run.
        """
        family = next((name for name in _PLANS if self.model.startswith(name)), "resnet")
        epochs, drops = _PLANS[family]
        if self.nepochs is not None:
            if self.nepochs < 1:
                raise ValueError(f"--nepochs {self.nepochs}: expected at least 1")
            # A shorter run drops at the same shares of it.
            epochs, drops = self.nepochs, sorted({round(d * self.nepochs / epochs) for d in drops} - {0, self.nepochs})
        lr = _LEARNING_RATES[self.optim] if self.lr is None else self.lr
        return learning_rate_plan(lr, epochs, drops if self.drop_at is None else self.drop_at, self.drop_by)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train as the flags say.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        A row for each epoch: epoch, learning rate, training loss, test accuracy, seconds.
    """
    args: TrainArguments = parse_args(TrainArguments, argv=argv, description=__doc__)[0]
    plan = args.plan()
    target = Path(args.save)
    state_path = target.with_name(target.name + ".state")
    state = load_state(state_path, args.to_dict()) if args.resume else None
    run, checkpoint = build_run(args)
    masks = sparse_masks(checkpoint, run.bare_model) if args.sparse else None
    if masks is not None:
        masks.attach(run.bare_model)
    momentum = 0.9 if args.momentum is None and args.optim == "sgd" else args.momentum
    optimizer = build_optimizer(run, args.optim, args, lr=plan[0], momentum=momentum, masks=masks)
    first = 0
    if state is not None:
        first = state["epoch"] + 1
        run.bare_model.load_state_dict(state["model"])
        resume_optimizer(state_path, state, optimizer)
    header = {"arguments": args.to_dict(), **describe_run(argv, run.accelerator.device)}
    log = RunLog(target.with_suffix(""), header, state["rows"] if state is not None else ())
    curve, steps = LossCurve(), len(plan) * len(run.train_loader)
    for epoch in range(first, len(plan)):
        set_learning_rate(optimizer, plan[epoch])
        row: dict[str, Any] = {"epoch": epoch, "lr": plan[epoch]}
        after_step = None if masks is None else lambda: masks.apply(run.bare_model)
        row |= run.train_epoch(optimizer, epoch, after_step, curve, max(1, steps // CURVE_ENTRIES))
        row["accuracy"] = run.evaluate()
        if run.accelerator.is_main_process:
            print(
                f"epoch {epoch:3d}: lr {row['lr']:g}, loss {row['loss']:.4f}, accuracy {row['accuracy']:.4f}, "
                f"{row['seconds']:.1f} s",
                flush=True,
            )
            log.add(row)
        run.save(target, model_state(run, masks, epoch=epoch))
        now = {"arguments": args.to_dict(), "epoch": epoch, "rows": log.rows, "model": run.bare_model.state_dict()}
        save_state(state_path, run, now, optimizer)
    if args.results is not None:
        write_results(args.results, run, log.rows, curve, argv)
    return log.rows


def write_results(
    path: str, run: VisionRun, rows: Sequence[Mapping[str, Any]], curve: LossCurve, argv: Sequence[str] | None
) -> None:
    """Write what `compare_optimizers.py` reads of a run; a run that was resumed has the curve of its last part."""
    accuracy, loss = run.accuracy_and_loss()
    results = {
        "train_runtime": sum(row["seconds"] for row in rows),
        "curve": curve.curve,
        "eval_accuracy": accuracy,
        "eval_loss": loss,
        "selection_metric": "eval_accuracy",
        "selection_value": accuracy,
    }
    if run.accelerator.is_main_process:
        write_json(path, {"results": results, **describe_run(argv, run.accelerator.device)})


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    main()
