"""GLUE tasks of random sentences in the layout of the Hub, their tokenizer, and a classifier that reads them."""

from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from mfac_hf.tasks import glue

WORDS = "the film plot was good bad long short not very a man saw it and slept".split()
ROWS = 20


def write_glue(directory, task, *, columns=None, labels=None, names=None, splits=None, rows=ROWS):
    """Write one task in the layout of ``nyu-mll/glue``: parquet files, and a README.md that lists them.

    ``labels`` replaces the labels of the first split; test splits hold hidden labels.
    """
    task = glue.get_task(task)
    columns = columns or task.text_columns
    splits = splits or ("train", *task.validation_splits, *task.server_files)
    label = Value("float32") if task.is_regression else ClassLabel(names=list(names or task.label_names))
    listing = [f"- config_name: {task.name}", "  data_files:"]
    for seed, split in enumerate(splits):
        rng = np.random.default_rng(seed)
        content = {name: [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(rows)] for name in columns}
        if split.startswith("test"):
            content["label"] = [-1] * rows
        elif task.is_regression:
            content["label"] = rng.uniform(0, 5, rows).tolist()
        else:
            content["label"] = [int(i) for i in rng.permutation(np.arange(rows) % task.num_labels)]
        kind = label
        if labels is not None and seed == 0:
            content["label"] = labels
            kind = Value("float32") if isinstance(labels[0], float) else Value("int64")
        content["idx"] = list(range(rows))
        features = Features({**dict.fromkeys(columns, Value("string")), "label": kind, "idx": Value("int32")})
        folder = Path(directory) / task.name
        folder.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(content, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
        listing += [f"  - split: {split}", f"    path: {task.name}/{split}-*"]
    readme = Path(directory) / "README.md"
    body = readme.read_text().removeprefix("---\nconfigs:\n").removesuffix("---\n") if readme.exists() else ""
    readme.write_text("---\nconfigs:\n" + body + "\n".join(listing) + "\n---\n")
    return str(directory)


def make_tokenizer(directory):
    """A WordPiece tokenizer over the synthetic words."""
    vocab = Path(directory) / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return BertTokenizer(vocab=str(vocab))


def save_classifier(directory):
    """Save a random classifier of two layers with its tokenizer; the directory as a string."""
    tokenizer = make_tokenizer(directory)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    return str(directory)
