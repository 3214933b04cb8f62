"""What ``run_glue.py`` and ``run_squad.py`` share: a run through an unmodified Trainer, from its flags to its results.

The script loads its data, makes the Trainer and evaluates; `TrainerRun` does everything else.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mfac_hf.callbacks import MFACLoggingCallback, MFACWindowCallback
from mfac_hf.checkpoints import WholeCheckpoints
from mfac_hf.hub.adapter import is_adapter
from mfac_hf.hub.push import push_run
from mfac_hf.hub.run_records import write_results
from mfac_hf.loss_scale import correct_loss_scale
from mfac_hf.pruning import MaskSet, PruningReport, prune_one_shot
from mfac_hf.training.arguments import (
    ModelArguments,
    OptimizerArguments,
    OptimizerMaker,
    build_optimizer,
    find_checkpoint,
    parse_args,
    require_action,
)
from mfac_hf.training.curve import LossCurveCallback
from mfac_hf.training.lora_arguments import LoraArguments, add_lora, base_of_adapter, describe_lora, load_adapter
from mfac_hf.training.pruning_arguments import GradualArguments, PruningArguments, build_pruning_callback

__all__ = ["TrainerRun"]

logger = logging.getLogger(__name__)


class TrainerRun:
    """A run of a training script: its flags, its model, the training or pruning, and its results.

    Args:
        data_arguments: the script's own dataclass of flags.
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.
        description: text above the flags in ``--help``.
        make_optimizer: makes the optimizer of the model and the flags.

    Attributes:
        data_args: the script's own flags.
        training_args: those of Trainer.
        prunes_only: whether the model is pruned without training.
        trains: whether the model is trained.

    Raises:
        FileNotFoundError: the checkpoint to resume from is missing.
        ValueError: a flag is out of range or belongs to another metric, or one that another needs is missing.
    """

    def __init__(
        self,
        data_arguments: type[Any],
        argv: Sequence[str] | None = None,
        description: str | None = None,
        make_optimizer: OptimizerMaker = build_optimizer,
    ) -> None:
        self.started, self.argv, self._make_optimizer = time.perf_counter(), argv, make_optimizer
        kinds = (ModelArguments, data_arguments, OptimizerArguments, LoraArguments, PruningArguments, GradualArguments)
        self.arguments = parse_args(*kinds, TrainingArguments, argv=argv, description=description)
        self.model_args: ModelArguments
        self.optimizer_args: OptimizerArguments
        self.lora_args: LoraArguments
        self.pruning_args: PruningArguments
        self.training_args: TrainingArguments
        self.model_args, self.data_args, self.optimizer_args, self.lora_args, *pruning_args, self.training_args = (
            self.arguments
        )
        self.pruning_args, gradual_args = pruning_args
        require_action(self.training_args)
        self.lora_args.check()
        if self.optimizer_args.optim_name == "mfac":
            self.optimizer_args.given()  # here: refuses options of another metric before anything is loaded
        self.prunes_only = self.pruning_args.is_one_shot(self.training_args)
        self.trains = self.training_args.do_train and not self.prunes_only
        self.pruning = build_pruning_callback(self.pruning_args, gradual_args, self.training_args)
        self.checkpoint = find_checkpoint(self.training_args)

    def load_model(
        self, auto_class: Any, max_seq_length: int, **config_options: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model and its tokenizer; a head that the model lacks is drawn by the seed.

        With ``--lora_rank`` the model is frozen and gets factors to train. The directory of an adapter stands for the
        model that it belongs to, with this adapter.

        Args:
            auto_class: the class of `transformers` whose head the task needs.
            max_seq_length: tokens of the longest input.
            **config_options: what the head needs in the model's configuration.

        Raises:
            ValueError: the model has fewer positions than ``max_seq_length``, or cannot get factors as the flags say.
        """
        set_seed(self.training_args.seed)
        adapter, source = self.model_args.model_name_or_path, self.model_args.model_source
        if has_adapter := is_adapter(adapter):
            source = {**source, "pretrained_model_name_or_path": base_of_adapter(adapter), "revision": "main"}
        config = AutoConfig.from_pretrained(**source, **config_options)
        positions = getattr(config, "max_position_embeddings", max_seq_length)
        if not 0 < max_seq_length <= positions:
            raise ValueError(
                f"--max_seq_length {max_seq_length}: expected 1 to {positions}, the positions of the model"
            )
        model, loading = auto_class.from_pretrained(**source, config=config, output_loading_info=True)
        if has_adapter:
            model = load_adapter(model, adapter, self.lora_args, trainable=self.trains)
        elif self.lora_args.lora_rank is not None:
            model = add_lora(model, self.lora_args, loading["missing_keys"])
        if is_adapter(model) and self.pruning_args.sparsity is not None:
            raise ValueError(
                "--sparsity prunes weights below the adapter, and the adapter alone is saved: merge it into the model "
                "first (peft's merge_and_unload), and prune that"
            )
        return model, AutoTokenizer.from_pretrained(**self.model_args.tokenizer_source)

    def build_optimizer(self, model: PreTrainedModel) -> Optimizer | None:
        """The optimizer to hand to Trainer; None where nothing is trained."""
        return self._make_optimizer(model, self.optimizer_args, self.training_args) if self.trains else None

    def select_best_by(self, metric: str) -> None:
        """Let ``--load_best_model_at_end`` choose by this metric, unless the flags name another one."""
        args = self.training_args
        # TrainingArguments puts "loss" where nothing was given; "eval_loss" still asks for the loss.
        if args.load_best_model_at_end and args.metric_for_best_model == "loss":
            args.metric_for_best_model, args.greater_is_better = metric, True

    def train(self, trainer: Trainer) -> dict[str, Any]:
        """Train the trainer's model, or prune it without training, as the flags say, and save it with its masks.

        Returns:
            Trainer's ``train_*`` metrics; of a training its ``curve`` (`mfac_hf.training.curve.Curve`); after pruning
            ``pruning``: sparsity overall and of each tensor, and the reports. Pruning without training adds, with
            ``--do_eval``, ``before_pruning``: the metrics of the dense model.

        Raises:
            ValueError: the model cannot be pruned as the flags say (`prune_one_shot`); nothing is written then.
        """
        MFACLoggingCallback.attach(trainer)
        if self.prunes_only:
            return self._prune(trainer)
        if not self.trains:
            return {}
        if self.pruning is not None:
            self.pruning.attach(trainer)
        correct_loss_scale(trainer)
        trainer.add_callback(MFACWindowCallback(self.checkpoint))
        WholeCheckpoints.attach(trainer)
        curve = LossCurveCallback.attach(trainer).recorder.curve
        results: dict[str, Any] = {**trainer.train(resume_from_checkpoint=self.checkpoint).metrics, "curve": curve}
        model: Any = trainer.model
        if is_adapter(model):
            results["lora"] = describe_lora(model)
        trainer.save_model()
        trainer.save_state()
        if self.pruning is not None:
            results["pruning"] = self._save_masks(self.pruning.masks, self.pruning.reports)
        return results

    def _prune(self, trainer: Trainer) -> dict[str, Any]:
        options = self.pruning_args.options(self.training_args.seed)  # here: refuses wrong flags before the evaluation
        results: dict[str, Any] = {}
        if self.training_args.do_eval:
            results["before_pruning"] = trainer.evaluate()
        assert self.pruning_args.sparsity is not None
        model: Any = trainer.model
        report = prune_one_shot(
            model,
            trainer.get_train_dataloader(),
            self.pruning_args.sparsity,
            targets=self.pruning_args.prune_targets,
            progress=not self.training_args.disable_tqdm,
            **dataclasses.asdict(options),
        )
        trainer.save_model()
        return results | {"pruning": self._save_masks(report.masks, [report])}

    def _save_masks(self, masks: MaskSet | None, reports: Sequence[PruningReport]) -> dict[str, Any]:
        """Save the masks beside the model, and return what ``results.json`` says of the pruning."""
        assert masks is not None
        if self.training_args.should_save:
            masks.save(str(self.training_args.output_dir))
        return {
            "sparsity": masks.sparsity,
            "sparsities": masks.sparsities(),
            "reports": [report.to_dict() for report in reports],
        }

    def finish(self, trainer: Trainer, results: dict[str, Any]) -> None:
        """Write ``results.json`` into the output directory, say what it has and, with ``--push_to_hub``, push it."""
        if trainer.is_world_process_zero():
            path = write_results(
                str(self.training_args.output_dir),
                results,
                arguments=self.arguments,
                argv=self.argv,
                started=self.started,
            )
            if "selection_value" in results:
                logger.info("%s %.4g", results["selection_metric"], results["selection_value"])
            logger.info("all results are in %s", path)
            push_run(trainer)
