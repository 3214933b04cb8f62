"""The generated sentiment task: labels follow the grammar, splits are clean, and counting words does not help."""

import re
from collections import Counter

import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from mfac_hf.tasks import toy
from mfac_hf.tasks.toy import toy_dataset, toy_model, toy_tokenizer


@pytest.fixture(scope="module")
def data():
    return toy_dataset(6000, 1500, seed=7)


def one_of(words):
    return "(?:" + "|".join(map(re.escape, words)) + ")"


# Written from the grammar in the module's docstring, and reading where the module writes.
DESCRIBED = f"(?:{one_of(toy.INTENSIFIERS)} )?{one_of((*toy.POSITIVE, *toy.NEGATIVE))}"
CLAUSE = (
    f"the {one_of(toy.ASPECTS)} (?:, which {one_of(toy.SPEAKERS)} called {DESCRIBED} , )?"
    f"{one_of(toy.VERBS)} (?:{one_of(toy.NEGATORS)} )?{DESCRIBED}"
)
SENTENCE = re.compile(
    f"(?:{one_of(toy.OPENERS)} , )?"
    f"(?:(?P<but_aside>{CLAUSE}) , but (?P<but>{CLAUSE})"
    f"|although (?P<although_aside>{CLAUSE}) , (?P<although>{CLAUSE})"
    f"|(?P<trailing>{CLAUSE}) , although (?P<trailing_aside>{CLAUSE})"
    f"|(?P<plain>{CLAUSE}))"
    f"(?: , {one_of(toy.CLOSERS)})? \\."
)


def polarity(clause):
    """Meaning of a clause: its last word, flipped by a negator before it."""
    words = clause.split()
    return (words[-1] in toy.POSITIVE) != any(word in toy.NEGATORS for word in words)


def parse(sentence):
    """The deciding clause and, where there is one, the clause that it overrides."""
    match = SENTENCE.fullmatch(sentence)
    assert match, sentence
    parts = {name: text for name, text in match.groupdict().items() if text}
    aside = next((text for name, text in parts.items() if name.endswith("_aside")), None)
    (main,) = [text for name, text in parts.items() if not name.endswith("_aside")]
    return main, aside


def test_labels_follow_from_parsing_the_sentence(data):
    for row in data["train"]:
        main, aside = parse(row["sentence"])
        assert polarity(main) == row["label"], row
        assert aside is None or polarity(aside) != row["label"], row


def test_every_kind_of_sentence_and_every_word_occurs(data):
    sentences = list(data["train"]["sentence"])
    kinds = Counter(name for s in sentences for name, text in SENTENCE.fullmatch(s).groupdict().items() if text)
    assert set(kinds) == set(SENTENCE.groupindex) and min(kinds.values()) > 500
    words = {word for sentence in sentences for word in sentence.split()}
    specials = set(toy_tokenizer().all_special_tokens)
    assert words == set(toy_tokenizer().get_vocab()) - specials


def test_exchanging_joined_clauses_keeps_the_words_and_flips_the_label(data):
    contrasts = 0
    for row in data["train"]:
        main, aside = parse(row["sentence"])
        if aside is None:
            continue
        exchanged = re.sub("MAIN", aside, row["sentence"].replace(aside, "ASIDE").replace(main, "MAIN"))
        exchanged = exchanged.replace("ASIDE", main)
        assert Counter(exchanged.split()) == Counter(row["sentence"].split())
        assert polarity(parse(exchanged)[0]) == 1 - row["label"]
        contrasts += 1
    assert contrasts > 3000


def test_bag_of_words_fails(data):
    classifier = make_pipeline(CountVectorizer(token_pattern=r"\S+"), LogisticRegression(max_iter=1000))
    classifier.fit(data["train"]["sentence"], data["train"]["label"])
    assert classifier.score(data["validation"]["sentence"], data["validation"]["label"]) < 0.65


def test_splits_are_balanced_and_without_duplicates(data):
    for split in data.values():
        assert 2 * sum(split["label"]) == len(split)
    sentences = [*data["train"]["sentence"], *data["validation"]["sentence"]]
    assert len(sentences) == len(set(sentences)) == 7500


def test_odd_sizes_are_balanced_within_one():
    data = toy_dataset(7, 1)
    assert [len(data[name]) for name in ("train", "validation")] == [7, 1]
    assert sum(data["train"]["label"]) == 3


def test_order_of_labels_is_shuffled(data):
    changes = sum(a != b for a, b in zip(data["train"]["label"][:-1], data["train"]["label"][1:], strict=True))
    assert 2700 < changes < 3300  # alternating labels change 5999 times, sorted ones once


def test_the_seed_decides_the_data():
    first, again, other = (toy_dataset(50, 20, seed=seed).data for seed in (3, 3, 4))
    assert all(first[name].table.equals(again[name].table) for name in first)
    assert not any(first[name].table.equals(other[name].table) for name in first)


def test_columns_and_label_names(data):
    assert data["train"].column_names == ["sentence", "label"]
    assert data["train"].features["label"].names == ["negative", "positive"]


@pytest.mark.parametrize(("sizes", "message"), [((0, 5), "train split.*got 0"), ((5, -1), "validation split.*got -1")])
def test_empty_splits_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        toy_dataset(*sizes)


def test_tokenizer_has_one_token_for_each_word(data):
    tokenizer = toy_tokenizer()
    assert 200 < len(tokenizer) < 400
    for sentence in data["validation"]["sentence"][:200]:
        assert tokenizer.tokenize(sentence) == sentence.split()
    ids = tokenizer(list(data["train"]["sentence"]))["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert max(map(len, ids)) <= tokenizer.model_max_length
    assert tokenizer.convert_ids_to_tokens(tokenizer("the plot was dull .")["input_ids"]) == [
        *"[CLS] the plot was dull . [SEP]".split()
    ]


def test_model_fits_the_tokenizer_and_is_decided_by_its_seed(data):
    state = torch.get_rng_state()
    model, again, other = toy_model(seed=1), toy_model(seed=1), toy_model(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    weight = "classifier.weight"
    assert not torch.equal(model.get_parameter(weight), other.get_parameter(weight))
    batch = toy_tokenizer()(data["validation"]["sentence"][:8], padding=True, return_tensors="pt")
    logits = model(**batch).logits
    assert logits.shape == (8, 2) and torch.equal(logits, model(**batch).logits)  # no dropout
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_longest_sentence_fits_the_model():
    def longest(words):
        return max((word for word in words), key=lambda phrase: len(phrase.split()))

    hearsay = f", which {longest(toy.SPEAKERS)} called very dull ,"
    clause = f"the plot {hearsay} was not very dull"
    sentence = f"{longest(toy.OPENERS)} , although {clause} , {clause} , {longest(toy.CLOSERS)} ."
    assert SENTENCE.fullmatch(sentence)
    length = len(toy_tokenizer()(sentence)["input_ids"])
    assert length <= toy_model().config.max_position_embeddings
