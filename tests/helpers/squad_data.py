"""Questions in the layout of the Hub's SQuAD, and their tokenizer."""

from pathlib import Path

from datasets import Dataset, Features, Value
from transformers import BertTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "who what where is was in the a river city king old new north gold built by of near sea 1066".split()
PIECES = [".", ",", "?", "-", "(", ")", "##s", "##ern", "##en", "##er"]
SCHEMA = Features(
    {
        **dict.fromkeys(("id", "title", "context", "question"), Value("string")),
        "answers": {"text": [Value("string")], "answer_start": [Value("int32")]},
    }
)
WIDE = {"max_seq_length": 64, "doc_stride": 16, "max_query_length": 16}
SMALL = {"max_seq_length": 24, "doc_stride": 6, "max_query_length": 5}


def make_tokenizer(directory):
    """A WordPiece tokenizer whose words may have two pieces."""
    vocab = Path(directory) / "vocab.txt"
    vocab.write_text("\n".join([*SPECIAL, *WORDS, *PIECES]) + "\n")
    return BertTokenizer(vocab=str(vocab), model_max_length=64)


def make_row(name, context, answer=None, *, question="where is the king ?", start=None, title="Kings"):
    """One question; ``answer`` is looked up in the context unless its start is given, and None is no answer."""
    if start is None and answer is not None:
        start = context.index(answer)
    answers = {"text": [], "answer_start": []} if answer is None else {"text": [answer], "answer_start": [start]}
    return {"id": name, "title": title, "context": context, "question": question, "answers": answers}


def make_examples(*rows):
    """A data set of rows."""
    return Dataset.from_list(list(rows), features=SCHEMA)


def write_squad(directory, **splits):
    """Write rows in the layout of ``rajpurkar/squad``: parquet files, and a README.md that lists them."""
    folder = Path(directory) / "plain_text"
    folder.mkdir(parents=True)
    listing = ["---", "configs:", "- config_name: plain_text", "  data_files:"]
    for split, examples in splits.items():
        examples.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        listing += [f"  - split: {split}", f"    path: plain_text/{split}-*"]
    (Path(directory) / "README.md").write_text("\n".join([*listing, "---", ""]))
    return str(directory)
