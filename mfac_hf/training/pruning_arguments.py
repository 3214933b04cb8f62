"""Pruning flags of the training scripts, and one-shot pruning of the model that a script has loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import Trainer, TrainingArguments

from mfac_hf.pruning.oneshot import prune_one_shot
from mfac_hf.pruning.options import PruningOptions, parse_damping

__all__ = ["PruningArguments", "one_shot"]


@dataclass
class PruningArguments:
    """Whether and how to prune. With --num_train_epochs 0 the model is pruned in one go and not trained."""

    sparsity: float | None = field(
        default=None, metadata={"help": "Share of the target weights to prune, such as 0.9; without it, none."}
    )
    prune_method: Literal["mfac", "magnitude"] = field(
        default="mfac", metadata={"help": "mfac, or magnitude as the baseline."}
    )
    prune_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions of parameter names; default: the linear layers of the encoder."},
    )
    recomputations: int = field(default=16, metadata={"help": "Sub-steps of a pruning, each with new gradients."})
    prune_num_grads: int = field(default=64, metadata={"help": "Gradients that each Fisher is made of."})
    prune_grad_batch_size: int = field(default=1, metadata={"help": "Examples that each of these is the mean of."})
    prune_block_size: int = field(default=128, metadata={"help": "Weights of a block of the Fisher."})
    prune_damping: str = field(
        default="1e-5", metadata={"help": "Damping of the Fisher, or auto: the best on held-out training examples."}
    )
    prune_selection: Literal["greedy", "diagonal"] = field(
        default="greedy", metadata={"help": "Which weights go; diagonal is the paper's way."}
    )
    prune_update: Literal["joint", "sum"] = field(
        default="joint", metadata={"help": "What the others do; sum is the paper's way."}
    )
    prune_pattern: str = field(default="unstructured", metadata={"help": "unstructured, 2:4, block4 and the like."})
    prune_scope: Literal["global", "uniform"] = field(
        default="global", metadata={"help": "Rank all targets together, or prune each alike."}
    )

    def options(self, seed: int) -> PruningOptions:
        """The flags as `PruningOptions`.

        Raises:
            ValueError: one is out of range.
        """
        return PruningOptions(
            method=self.prune_method,
            num_grads=self.prune_num_grads,
            grad_batch_size=self.prune_grad_batch_size,
            block_size=self.prune_block_size,
            damping=parse_damping(self.prune_damping, "--prune_damping"),
            recomputations=self.recomputations,
            selection=self.prune_selection,
            update=self.prune_update,
            pattern=self.prune_pattern,
            scope=self.prune_scope,
            seed=seed,
        )

    def is_one_shot(self, training_args: TrainingArguments) -> bool:
        """Whether to prune without training.

        Raises:
            ValueError: there is a sparsity, but no training split to take gradients from.
        """
        if self.sparsity is None:
            return False
        if not training_args.do_train:
            raise ValueError(
                f"--sparsity {self.sparsity:g} needs --do_train, for gradients of the training split; "
                "with --num_train_epochs 0 nothing is trained"
            )
        return training_args.num_train_epochs == 0 and training_args.max_steps <= 0


def one_shot(trainer: Trainer, pruning_args: PruningArguments) -> dict[str, Any]:
    """Prune the trainer's model in one go and save it, with its masks, into the output directory.

    Returns:
        ``pruning``: sparsity of each tensor and overall, and the report; with ``--do_eval`` also ``before_pruning``:
        the metrics of the model as it was.

    Raises:
        ValueError: see `prune_one_shot`; nothing is written then.
    """
    training_args = trainer.args
    options = pruning_args.options(training_args.seed)  # wrong flags are told before the evaluation
    model: Any = trainer.model
    results: dict[str, Any] = {}
    if training_args.do_eval:
        results["before_pruning"] = trainer.evaluate()
    assert pruning_args.sparsity is not None
    report = prune_one_shot(
        model,
        trainer.get_train_dataloader(),
        pruning_args.sparsity,
        targets=pruning_args.prune_targets,
        progress=not training_args.disable_tqdm,
        **dataclasses.asdict(options),
    )
    trainer.save_model()
    assert report.masks is not None
    if training_args.should_save:
        report.masks.save(str(training_args.output_dir))
    results["pruning"] = {
        "sparsity": report.sparsity,
        "sparsities": report.sparsities,
        "reports": [report.to_dict()],
    }
    return results
