"""Fine-tune on SQuAD: ``python scripts/run_squad.py --model_name_or_path MODEL --do_train --do_eval``.

A BERT (or any model with a span head) learns SQuAD v1.1 or v2.0 through an unmodified Trainer, with M-FAC or AdamW:

    python scripts/run_squad.py --model_name_or_path google/bert_uncased_L-2_H-128_A-2 --dataset_name rajpurkar/squad \
        --do_train --do_eval --optim_name mfac --num_grads 1024 --output_dir outputs/squad-mfac
    python scripts/run_squad.py scripts/recipes/squad_v2_mfac.yaml --seed 1 --output_dir outputs/squad_v2-mfac-1

The same flags take models and data from the Hub or from local directories. All flags of TrainingArguments work. A
recipe (YAML or JSON) holds flags; flags after it win. ``--holdout_fraction 0.1`` tunes on a fixed tenth of the
training articles and leaves the validation split alone. ``--resume_from_checkpoint last`` continues a run that was
cut off.

``--lora_rank 8`` trains low-rank factors and a head beside frozen weights (LoRA, with peft) and saves them alone; the
output directory is then a model to evaluate like any other.

Writes ``results.json`` (metrics, command line, arguments, versions, time, memory) into the output directory and, for
``--do_predict``, the answers to the evaluated questions: ``predictions.json`` and, for v2, ``null_odds.json`` as the
official evaluation scripts take them, and ``nbest_predictions.json``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, Trainer, TrainingArguments

from mfac_hf.hub_names import SQUAD
from mfac_hf.storage import write_text
from mfac_hf.tasks import squad
from mfac_hf.tasks.squad_answers import AnswerOptions, SquadEvaluation, SquadPredictions
from mfac_hf.tasks.squad_metric import best_null_threshold
from mfac_hf.training.arguments import OptimizerMaker, build_optimizer, flag
from mfac_hf.training.trainer_run import TrainerRun

SELECTION_METRIC = "eval_f1"


@dataclass
class SquadArguments:
    """Which data, how much of them, and how answers are chosen."""

    dataset_name: str = flag(SQUAD["squad"], "Name on the Hub, or a local directory in the same layout.")
    train_dataset_name: str | None = flag(None, "Name or directory of the training split; default: --dataset_name.")
    version_2_with_negative: bool = flag(False, "Some questions have no answer (SQuAD v2), and the model may say so.")
    max_seq_length: int = flag(
        squad.MAX_SEQ_LENGTH, "Tokens of a window: question, part of the context, special tokens."
    )
    doc_stride: int = flag(squad.DOC_STRIDE, "Tokens that consecutive windows of a context share.")
    max_query_length: int = flag(squad.MAX_QUERY_LENGTH, "Tokens of the longest question; longer ones are truncated.")
    n_best_size: int = flag(AnswerOptions.n_best_size, "Answers to keep of each question.")
    max_answer_length: int = flag(AnswerOptions.max_answer_length, "Tokens of the longest answer.")
    null_score_diff_threshold: float = flag(
        AnswerOptions.null_score_diff_threshold,
        "v2: no answer where its score exceeds that of the best answer by more than this.",
    )
    max_train_samples: int | None = flag(
        None, "Train on N questions only, drawn from all articles, always the same ones."
    )
    max_eval_samples: int | None = flag(
        None, "Evaluate on N questions only, drawn from all articles, always the same ones."
    )
    holdout_fraction: float | None = flag(
        None,
        "For tuning: hold out this fraction of the training articles and evaluate on them, in place of the validation "
        "split. Their titles and the fraction alone decide which articles these are.",
    )


def choose_splits(
    data_args: SquadArguments, training_args: TrainingArguments, cache_dir: str | None
) -> tuple[Dataset | None, Dataset | None]:
    """Load the questions to train on and those to evaluate.

    Raises:
        ValueError: the data are unsuitable (`squad.load_squad`), or a limit or the hold-out fraction is out of range.
    """

    def load(name: str, split: str) -> Dataset:
        return squad.load_squad(
            name, split, version_2_with_negative=data_args.version_2_with_negative, cache_dir=cache_dir
        )

    def limit(examples: Dataset, flag: str, count: int | None) -> Dataset:
        if count is not None and count < 1:
            raise ValueError(f"{flag} {count}: expected at least 1")
        if count is None or count >= len(examples):
            return examples
        # The files are sorted by article: their first N questions would be about two or three things.
        return examples.shuffle(seed=squad.HOLDOUT_SEED).select(range(count))

    evaluate = training_args.do_eval or training_args.do_predict
    train = evaluation = None
    if training_args.do_train or data_args.holdout_fraction is not None:
        train = load(data_args.train_dataset_name or data_args.dataset_name, "train")
    if train is not None and data_args.holdout_fraction is not None:
        train, evaluation = squad.hold_out_articles(train, data_args.holdout_fraction)
    elif evaluate:
        evaluation = load(data_args.dataset_name, "validation")
    if train is not None:
        train = limit(train, "--max_train_samples", data_args.max_train_samples)
    if evaluation is not None:
        evaluation = limit(evaluation, "--max_eval_samples", data_args.max_eval_samples)
    return train if training_args.do_train else None, evaluation if evaluate else None


def write_predictions(output_dir: str, predictions: SquadPredictions) -> None:
    """Write the answers by question id, the n best answers and, for v2, the null score differences."""
    files = {"predictions.json": predictions.texts, "nbest_predictions.json": predictions.nbest}
    if predictions.null_score_diffs:
        files["null_odds.json"] = predictions.null_score_diffs
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        write_text(Path(output_dir) / name, text + "\n")


def main(argv: Sequence[str] | None = None, make_optimizer: OptimizerMaker = build_optimizer) -> dict[str, Any]:
    """Run what the flags ask for.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.
        make_optimizer: makes the optimizer of the model and the flags.

    Returns:
        The metrics: Trainer's ``train_*`` and ``eval_*`` values, the name and value of the metric that selects models
        and, for v2 with ``--do_predict``, under ``threshold_search`` what the best threshold would have given.
    """
    run = TrainerRun(SquadArguments, argv, __doc__, make_optimizer)
    data_args, training_args = run.data_args, run.training_args
    train, evaluation = choose_splits(data_args, training_args, run.model_args.cache_dir)
    if evaluation is not None and training_args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "--train_sampling_strategy group_by_length also reorders the evaluation, so that logits no longer meet "
            "their questions: leave it out, or train without --do_eval and --do_predict"
        )
    # A checkpoint may come from a task with another number of outputs; a span has two.
    model, tokenizer = run.load_model(AutoModelForQuestionAnswering, data_args.max_seq_length, num_labels=2)

    def features(examples: Dataset) -> Dataset:
        with training_args.main_process_first(desc="cutting into features"):
            return squad.squad_features(
                examples,
                tokenizer,
                max_seq_length=data_args.max_seq_length,
                doc_stride=data_args.doc_stride,
                max_query_length=data_args.max_query_length,
            )

    scoring = None
    if evaluation is not None:
        scoring = SquadEvaluation(
            evaluation,
            features(evaluation),
            AnswerOptions(
                n_best_size=data_args.n_best_size,
                max_answer_length=data_args.max_answer_length,
                version_2_with_negative=data_args.version_2_with_negative,
                null_score_diff_threshold=data_args.null_score_diff_threshold,
            ),
        )
    run.select_best_by(SELECTION_METRIC)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=features(train) if train is not None else None,
        eval_dataset=scoring.features if scoring is not None else None,
        processing_class=tokenizer,
        compute_metrics=scoring,
        optimizers=(run.build_optimizer(model), None),
    )
    results = {"task": "squad_v2" if data_args.version_2_with_negative else "squad", **run.train(trainer)}
    if scoring is not None:
        results |= evaluate(trainer, scoring)
        results["evaluated_on"] = "validation" if data_args.holdout_fraction is None else "held_out"
    run.finish(trainer, results)
    return results


def evaluate(trainer: Trainer, scoring: SquadEvaluation) -> dict[str, Any]:
    """Evaluate the trainer's model and, with ``--do_predict``, write its answers and search the best threshold."""
    if trainer.args.do_predict:
        # One pass over the questions serves --do_eval too.
        output = trainer.predict(scoring.features, metric_key_prefix="eval")
        results: dict[str, Any] = {**(output.metrics or {})}
        predictions = scoring.answers(output)
        if trainer.is_world_process_zero():
            write_predictions(trainer.args.output_dir, predictions)
        if scoring.options.version_2_with_negative:
            results["threshold_search"] = best_null_threshold(
                predictions.best_spans, predictions.null_score_diffs, scoring.references
            )
    else:
        results = trainer.evaluate()
    return results | {"selection_metric": SELECTION_METRIC, "selection_value": results[SELECTION_METRIC]}


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("mfac_hf").setLevel(logging.INFO)
    main()
