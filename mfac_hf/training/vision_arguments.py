"""Flags that the scripts for vision models share, and what these flags build."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from mfac_hf.defaults import MFAC_DEFAULTS
from mfac_hf.models import MODEL_NAMES, Checkpoint, ResNetCifar, create_model, read_checkpoint
from mfac_hf.optim.mfac import MFAC
from mfac_hf.pruning.masks import MaskSet
from mfac_hf.pruning.targets import find_targets
from mfac_hf.tasks.vision import load_vision
from mfac_hf.tasks.vision_preprocess import NORMALIZATIONS, Preprocess
from mfac_hf.training.arguments import SWITCH, flag
from mfac_hf.training.vision_run import VisionRun

__all__ = [
    "VisionArguments",
    "build_optimizer",
    "build_run",
    "initial_masks",
    "masks_of",
    "model_state",
    "set_learning_rate",
    "sparse_masks",
    "split_images",
    "vision_targets",
]


# One for all runs: what was tuned on must stay out of all of them.
_HOLDOUT_SEED = 2024
# The reference's script has another damping than its optimizer.
_MFAC_DEFAULTS = {**MFAC_DEFAULTS, "identity": {**MFAC_DEFAULTS["identity"], "damping": 1e-5}}
_ADAM, _IDENTITY = _MFAC_DEFAULTS["adam"], _MFAC_DEFAULTS["identity"]


@dataclass
class VisionArguments:
    """Model, data and optimizer."""

    model: str = field(metadata={"help": f"One of {', '.join(MODEL_NAMES)}."})
    dataset: str = flag(
        "digits",
        "'digits' (comes with scikit-learn), 'cifar10', 'cifar100', a name on the Hub, a local directory in the same "
        "layout, or a folder with train/CLASS/IMAGE and val/CLASS/IMAGE.",
        "--dataset_path",
        "--data",
    )
    checkpoint: str | None = flag(None, "File of weights to start from: .pth, .pth.tar, .th or .safetensors.")
    normalization: str | None = flag(
        None,
        f"One of {', '.join(NORMALIZATIONS)}; default: the one known for the checkpoint, else the data's.",
    )
    augment: bool = flag(True, "Crop training images at random and, but for digits, mirror half of them.")
    train_images: int | None = flag(None, "Number of images to train on, chosen by --seed; default: all.")
    holdout: int | None = flag(
        None,
        "For tuning: hold out this number of training images, always the same, and evaluate on them, in place of the "
        "test images.",
    )
    batchsize: int = flag(128, "Images in a batch, over all processes.")
    mixed_precision: Literal["no", "bf16"] | None = flag(
        None, "bf16 runs the model under autocast; default: what accelerate's configuration says, else no."
    )
    nworkers: int | None = flag(None, "Processes that read images; default: none for images in memory, else up to 8.")
    weightdecay: float = flag(0.0, "Weight decay: coupled, but with adamw and with mfac --metric adam decoupled.")
    drop_at: list[int] | None = flag(None, "Epochs at which the learning rate drops.")
    drop_by: float = flag(0.1, "Factor by which it drops.")
    metric: Literal["identity", "adam"] = flag(
        "identity",
        "mfac: what damping is measured in. identity is the optimizer of the paper, which the flags of its script "
        "mean; adam is the default of mfac_hf.MFAC and takes the learning rate of adamw.",
    )
    ngrads: int | None = flag(
        None,
        f"mfac: gradients in the optimizer's window; default: {_IDENTITY['num_grads']}, with --metric adam "
        f"{_ADAM['num_grads']}.",
    )
    damping: float | None = flag(
        None,
        f"mfac: multiple of the identity that is added to the Fisher, default {_IDENTITY['damping']:g}; with --metric "
        f"adam damping relative to the stored gradients, default {_ADAM['damping']:g}.",
    )
    grad_decay: float | None = flag(
        None,
        "mfac, --metric identity: decay of the exponential average of gradients that is preconditioned; default: 0.",
    )
    normalize: Literal["num_grads", "count"] | None = flag(
        None,
        "mfac, --metric identity: divide the Fisher by ngrads (the paper, default), or by the gradients that the "
        "window holds so far.",
    )
    share_window: bool = flag(
        True, "mfac: under several processes (accelerate launch) each keeps a part of the window, if that is large."
    )
    nesterov: bool | None = flag(
        None,
        "mfac, --metric adam: let the average of the gradients look one step ahead, as NAdam does; default: True.",
        **SWITCH,
    )
    window_dtype: Literal["float32", "bfloat16"] | None = flag(
        None,
        f"mfac: storage of the window; default: {_IDENTITY['window_dtype']}, with --metric adam "
        f"{_ADAM['window_dtype']}.",
    )
    seed: int = flag(0, "Seed of weights, order, augmentation and the choice of gradients.")
    resume: bool = flag(False, "Continue the run of the same flags that was cut off; start if there is none.")
    progress: bool = flag(True, "Show progress bars.")

    def __post_init__(self) -> None:
        """Put the defaults of the metric in place of what was not given, so that logs have the values."""
        defaults = _MFAC_DEFAULTS[self.metric]
        for name, option in (
            ("ngrads", "num_grads"),
            *((name, name) for name in ("damping", "grad_decay", "normalize", "nesterov", "window_dtype")),
        ):
            if getattr(self, name) is None:
                setattr(self, name, defaults.get(option))

    def to_dict(self) -> dict[str, Any]:
        """The flags that decide the result, as plain values."""
        free = ("resume", "progress", "nworkers", "share_window")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


def build_run(args: VisionArguments) -> tuple[VisionRun, Checkpoint | None]:
    """Load data, checkpoint and model.

    Raises:
        FileNotFoundError: the checkpoint or the data set is missing.
        ValueError: a flag is out of range, or checkpoint, model and data do not fit together.
    """
    checkpoint = None if args.checkpoint is None else read_checkpoint(args.checkpoint)
    data = load_vision(args.dataset, seed=args.seed)
    if args.holdout is not None:
        held_out, rest = split_images(data.train, args.holdout, _HOLDOUT_SEED, "--holdout")
        data = dataclasses.replace(data, train=rest, test=held_out)
    if args.train_images is not None:
        chosen, _ = split_images(data.train, args.train_images, args.seed, "--train_images")
        data = dataclasses.replace(data, train=chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = create_model(
            args.model,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            weights=None if checkpoint is None else checkpoint.weights,
        )
    normalization = args.normalization or (checkpoint.normalization if checkpoint is not None else None)
    run = VisionRun(
        model,
        data,
        Preprocess(data, normalization),
        batch_size=args.batchsize,
        seed=args.seed,
        mixed_precision=args.mixed_precision,
        num_workers=args.nworkers,
        augment=args.augment,
        progress=args.progress,
    )
    return run, checkpoint


def split_images(images: Any, count: int, seed: int, name: str = "count") -> tuple[Any, Any]:
    """Divide images at random into a part of ``count`` images and the rest.

    Args:
        images: a split.
        count: images in the first part, from 1 to all of them.
        seed: seed of the choice.
        name: what an error calls the count.

    Raises:
        ValueError: the count is out of range.
    """
    if not 1 <= count <= len(images):
        raise ValueError(f"{name} {count}: expected 1 to {len(images)}, the training images")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(images, order[:count]), Subset(images, order[count:])


def masks_of(checkpoint: Checkpoint, model: nn.Module) -> MaskSet | None:
    """The masks of a checkpoint, by parameter name; None if it has none.

    A flat mask, as the reference writes it, covers the weights whose names contain ``conv`` or ``fc``.

    Raises:
        ValueError: the masks are another model's.
    """
    mask = checkpoint.mask
    if isinstance(mask, Tensor):
        names = {n: p for n, p in model.named_parameters() if ("conv" in n or "fc" in n) and "bias" not in n}
        expected = sum(p.numel() for p in names.values())
        if mask.numel() != expected:
            raise ValueError(
                f"the checkpoint has a flat mask of {mask.numel():,} weights; this model's convolutions and fc have "
                f"{expected:,}"
            )
        pieces = mask.flatten().split([p.numel() for p in names.values()])
        mask = {name: piece.reshape(p.shape) for (name, p), piece in zip(names.items(), pieces, strict=True)}
    if mask is None:
        return None
    masks = MaskSet(mask)
    masks.check(model)
    return masks


def vision_targets(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The weights to prune: those of `find_targets`, less the 1 x 1 shortcuts of a CIFAR ResNet.

    The shortcuts are one weight in a hundred, and pruning them costs more than pruning others. The reference leaves
    them alone too, so sparsities mean the same there and here.

    Args:
        model: a model.
        patterns: regular expressions of parameter names; None for that choice.
    """
    if patterns is None and isinstance(model, ResNetCifar):
        patterns = [r"conv\d", model.classifier_name]
    return find_targets(model, patterns)


def initial_masks(checkpoint: Checkpoint | None, model: nn.Module, patterns: Sequence[str] | None = None) -> MaskSet:
    """Masks of the weights to prune; zeros, and what the checkpoint's masks prune, are pruned already.

    Args:
        checkpoint: what the model was loaded from, if anything.
        model: the model.
        patterns: see `vision_targets`.

    Raises:
        ValueError: the checkpoint's masks are another model's.
    """
    masks = MaskSet.from_model(model, vision_targets(model, patterns))
    if checkpoint is not None and (given := masks_of(checkpoint, model)) is not None:
        masks.update({name: keep & masks[name] for name, keep in given.items() if name in masks})
    return masks


def sparse_masks(checkpoint: Checkpoint | None, model: nn.Module) -> MaskSet:
    """Masks of a sparse model: those of the checkpoint or, where it has none, the zeros among the weights to prune.

    Raises:
        ValueError: the model is dense, or the masks are another model's.
    """
    masks = None if checkpoint is None else masks_of(checkpoint, model)
    if masks is None:
        masks = MaskSet.from_model(model, vision_targets(model))
    if masks.sparsity == 0:
        raise ValueError("--sparse: no weight of this model is zero; give the --checkpoint of a pruned model")
    return masks


def build_optimizer(
    run: VisionRun,
    name: str,
    args: VisionArguments,
    *,
    lr: float,
    momentum: float | None,
    masks: MaskSet | None = None,
) -> Any:
    """Make an optimizer and prepare it.

    Several processes share M-FAC's window, if it is large (``--share_window``).

    Args:
        run: the run with the model.
        name: ``"sgd"``, ``"adam"``, ``"adamw"`` or ``"mfac"``.
        args: weight decay, and the options of M-FAC.
        lr: learning rate.
        momentum: decay of the average of gradients (sgd) or directions (mfac in the identity metric); others have
            their own.
        masks: weights that M-FAC leaves out of its window.

    Raises:
        ValueError: an option of M-FAC is out of range, or of another metric than the chosen one.
    """
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum or 0.0, weight_decay=args.weightdecay)
    elif name == "adam":
        optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=args.weightdecay)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=args.weightdecay)
    else:
        options: dict[str, Any] = {"momentum": momentum, "grad_decay": args.grad_decay, "normalize": args.normalize}
        options |= {"num_grads": args.ngrads, "damping": args.damping, "nesterov": args.nesterov}
        options["window_dtype"] = getattr(torch, str(args.window_dtype))
        optimizer = MFAC(
            parameters,
            lr=lr,
            metric=args.metric,
            **{name: value for name, value in options.items() if value is not None},
            weight_decay=args.weightdecay,
            masks=None if masks is None else masks.parameter_masks(run.bare_model),
            process_group="auto" if args.share_window else None,
        )
        optimizer.trust_loss_scale()  # the loss is a mean over the batch, and the gradients are one over the processes
    return run.accelerator.prepare(optimizer)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def model_state(run: VisionRun, masks: MaskSet | None = None, **more: Any) -> dict[str, Any]:
    """Content of a checkpoint file: plain values and tensors, which the reference's scripts read too."""
    state: dict[str, Any] = {"model": run.bare_model.state_dict(), "normalization": run.preprocess.normalization}
    if masks is not None:
        state["mask"] = {name: keep.cpu() for name, keep in masks.items()}
    return state | more
