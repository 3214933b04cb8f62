"""Train a small BERT from random weights to fill in words: ``python scripts/train_mlm.py --do_train --do_eval``.

The text is generated (`mfac_hf.tasks.toy`) or, with a vocabulary, that of SST-2 and of SQuAD's contexts:

    python scripts/train_mlm.py --do_train --do_eval --num_train 6400 --per_device_train_batch_size 16 \
        --num_train_epochs 1 --learning_rate 1e-3 --warmup_steps 0.1 --output_dir outputs/mlm
    python scripts/train_mlm.py --glue_name nyu-mll/glue --squad_name rajpurkar/squad --vocab_file vocab.txt \
        --do_train --do_eval --num_train 6400 --num_train_epochs 1 --output_dir outputs/mlm

BERT-tiny's shape unless flags say otherwise. The loss is judged on blocks of the validation splits, whose masks are
always the same. All flags of TrainingArguments work; results go into ``results.json`` in the output directory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import BertTokenizer, TrainingArguments

from mfac_hf.tasks import mlm
from mfac_hf.tasks.toy import toy_tokenizer
from mfac_hf.training.arguments import OptimizerMaker, build_optimizer, flag
from mfac_hf.training.scratch_run import ScratchTask, hold_out, run_from_scratch

SHORTEST = 5  # tokens of the shortest generated sentence: "the film was dull ."


@dataclass
class MlmArguments:
    """Which text, how much of it, and how large a model."""

    glue_name: str | None = flag(None, "GLUE on the Hub or in a local directory; SST-2's sentences are read.")
    squad_name: str | None = flag(None, "SQuAD on the Hub or in a local directory; its contexts are read.")
    vocab_file: str | None = flag(None, "vocab.txt of a lower-casing BERT; needed where text is read.")
    cache_dir: str | None = flag(None, "Directory for downloads.")
    max_seq_length: int = flag(64, "Tokens in a block.")
    num_train: int = flag(6400, "Blocks to train on.")
    num_validation: int = flag(512, "Blocks to evaluate on.")
    holdout_fraction: float | None = flag(
        None, "For tuning: hold out this fraction of the training blocks and evaluate on them."
    )
    hidden_size: int = flag(128, "Width of the BERT.")
    num_layers: int = flag(2, "Layers of the BERT.")
    dropout: float = flag(0.0, "Share of activations that is dropped in training.")

    def check(self) -> None:
        """Refuse flags that do not go together.

        Raises:
            ValueError: text without a vocabulary, a vocabulary without text, or no blocks.
        """
        reads = self.glue_name is not None or self.squad_name is not None
        if reads and self.vocab_file is None:
            raise ValueError("--glue_name and --squad_name need a --vocab_file, such as bert-base-uncased's vocab.txt")
        if self.vocab_file is not None and not reads:
            raise ValueError("--vocab_file needs text: give --glue_name, --squad_name or both, or leave it out")
        for name in ("num_train", "num_validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least 1")


def make_task(args: MlmArguments, training_args: TrainingArguments) -> ScratchTask:
    """Read or generate the text, and make the model."""
    args.check()
    tokenizer = toy_tokenizer() if args.vocab_file is None else mlm.read_vocabulary(args.vocab_file)

    def blocks(split: str, count: int) -> Dataset:
        if args.vocab_file is None:
            texts = mlm.generated_texts(count * args.max_seq_length // SHORTEST + 1, split)
        else:
            texts = mlm.read_texts(args.glue_name, args.squad_name, split, args.cache_dir)
        return mlm.token_blocks(texts, tokenizer, args.max_seq_length, count)

    train, evaluation = hold_out(
        blocks("train", args.num_train), blocks("validation", args.num_validation), args.holdout_fraction
    )
    return ScratchTask(
        model=_model(args, tokenizer, training_args.seed),
        tokenizer=tokenizer,
        train=train,
        evaluation=mlm.mask_once(evaluation, tokenizer),
        collator=mlm.masking_collator(tokenizer),
        selection_metric="eval_loss",
    )


def _model(args: MlmArguments, tokenizer: BertTokenizer, seed: int) -> mlm.BertForMaskedPositions:
    return mlm.mlm_model(
        tokenizer,
        seed=seed,
        length=args.max_seq_length,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        dropout=args.dropout,
    )


def main(argv: Sequence[str] | None = None, make_optimizer: OptimizerMaker = build_optimizer) -> dict[str, Any]:
    """Run what the flags ask for, and return the results."""
    return run_from_scratch(MlmArguments, make_task, argv, __doc__, make_optimizer)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("mfac_hf").setLevel(logging.INFO)
    main()
