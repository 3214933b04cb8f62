"""SQuAD: data and features, on synthetic data and, where there is some, on real data."""

import itertools
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mfac_hf.tasks.squad import NULL_POSITION, hold_out_articles, load_squad, squad_features
from mfac_hf.tasks.squad_metric import SquadMetric
from tests.helpers.squad_data import (
    PIECES,
    SMALL,
    SPECIAL,
    WIDE,
    WORDS,
    make_examples,
    make_row,
    make_tokenizer,
    write_squad,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The synthetic tokenizer."""
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("vocab"))
    assert len(tokenizer) == len(SPECIAL) + len(WORDS) + len(PIECES)
    return tokenizer


def labelled_text(feature, context):
    """The text that a feature's labels point at, or None."""
    if feature["start_positions"] == NULL_POSITION:
        assert feature["end_positions"] == NULL_POSITION
        return None
    first, last = (feature[key] - feature["context_position"] for key in ("start_positions", "end_positions"))
    assert 0 <= first <= last < len(feature["token_starts"])
    return context[feature["token_starts"][first] : feature["token_ends"][last]]


def test_short_context_is_one_feature_whose_label_decodes_to_the_answer(tokenizer):
    """Positions count from [CLS] and end inclusively; the label survives the tokenizer's own decoding."""
    context = "the old king was in the northern city, by the river."
    features = squad_features(make_examples(make_row("q", context, "northern city")), tokenizer, **WIDE)
    (feature,) = features
    tokens = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    assert tokens[:7] == ["[CLS]", "where", "is", "the", "king", "?", "[SEP]"] and feature["context_position"] == 7
    assert tokens[feature["start_positions"] : feature["end_positions"] + 1] == ["north", "##ern", "city"]
    span = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
    assert tokenizer.decode(span) == "northern city" == labelled_text(feature, context)
    assert len(feature["input_ids"]) == len(feature["attention_mask"]) == len(feature["token_type_ids"])


def test_label_is_where_the_offset_says_not_at_the_first_occurrence(tokenizer):
    """The same word twice: the second one is the answer."""
    context = "the king is in the city near the king"
    second = context.rindex("king")
    (feature,) = squad_features(make_examples(make_row("q", context, "king", start=second)), tokenizer, **WIDE)
    assert feature["token_starts"][feature["start_positions"] - feature["context_position"]] == second


@pytest.mark.parametrize(
    ("answer", "labelled"),
    [
        ("106", "1066"),
        ("orth", "north"),
        ("her", "northern"),
        (" river ", "river"),
        ("city, by", "city, by"),
        ("the", "the"),
    ],
)
def test_answers_that_are_not_whole_tokens(answer, labelled, tokenizer):
    """Cut tokens are labelled whole, blanks around an answer do not widen it."""
    context = "the northern city, by the river in 1066"
    (feature,) = squad_features(make_examples(make_row("q", context, answer)), tokenizer, **WIDE)
    assert labelled_text(feature, context) == labelled


def test_long_context_gives_overlapping_windows_of_their_question(tokenizer):
    """Each window keeps its id, windows share doc_stride tokens, and together they cover the context."""
    context = " ".join(WORDS * 3)
    examples = make_examples(make_row("long", context, "gold"), make_row("short", "the sea", "sea"))
    features = squad_features(examples, tokenizer, **SMALL)
    assert features["example_id"][:].count("short") == 1
    windows = [feature for feature in features if feature["example_id"] == "long"]
    assert len(windows) > 3 and all(len(feature["input_ids"]) <= SMALL["max_seq_length"] for feature in features)
    for one, other in itertools.pairwise(windows):
        assert one["token_starts"][-SMALL["doc_stride"] :] == other["token_starts"][: SMALL["doc_stride"]]
    covered = {start for feature in windows for start in feature["token_starts"]}
    assert len(covered) == len(tokenizer(context, add_special_tokens=False)["input_ids"])
    texts = [labelled_text(feature, context) for feature in windows]
    assert set(texts) == {"gold", None}


@st.composite
def questions(draw):
    """A context of words with odd separators, and an answer that is some of its words, or none."""
    words = draw(
        st.lists(st.sampled_from([*WORDS, "kings", "northern", "unknown", "éclair"]), min_size=1, max_size=60)
    )
    gaps = draw(
        st.lists(st.sampled_from([" ", "  ", "\n", ", ", ". ", "-"]), min_size=len(words), max_size=len(words))
    )
    starts, context = [], ""
    for word, gap in zip(words, gaps, strict=True):
        starts.append(len(context))
        context += word + gap
    first = draw(st.integers(0, len(words) - 1))
    last = draw(st.integers(first, min(first + 4, len(words) - 1)))
    if draw(st.integers(0, 4)) == 0:
        return context, None, None
    return context, context[starts[first] : starts[last] + len(words[last])], starts[first]


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(questions(), min_size=1, max_size=6), length=st.integers(18, 40))
def test_every_window_is_labelled_exactly_if_it_holds_the_answer(rows, length, tokenizer):
    """Against brute force: the answer's tokens are a window's, or the label is null; short answers are never lost."""
    examples = make_examples(*(make_row(str(i), *row[:2], start=row[2]) for i, row in enumerate(rows)))
    stride = 6
    features = squad_features(examples, tokenizer, max_seq_length=length, doc_stride=stride, max_query_length=5)
    must_be_found, found = set(), set()
    for feature in features:
        name = feature["example_id"]
        context, answer, start = rows[int(name)]
        offsets = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        window = set(zip(feature["token_starts"], feature["token_ends"], strict=True))
        assert window <= set(offsets)
        text = labelled_text(feature, context)
        if answer is None:
            assert text is None
            continue
        touched = {(a, b) for a, b in offsets if a < start + len(answer) and b > start}
        assert text == (answer if touched <= window else None)
        if len(touched) <= stride + 1 or touched <= window:
            must_be_found.add(name)
        if text is not None:
            found.add(name)
    assert found == must_be_found


def test_long_questions_are_cut_with_a_warning(tokenizer, caplog):
    """A question longer than the window leaves the label intact, and is said."""
    question = "who is the old king of the new city by the sea ? " * 4
    context = "the northern city near the river"
    examples = make_examples(
        make_row("a", context, "northern city", question=question), make_row("b", context, "river", question="who ?")
    )
    with caplog.at_level(logging.WARNING, logger="mfac_hf"):
        features = squad_features(examples, tokenizer, **SMALL)
    assert "1 questions are cut to max_query_length 5 tokens" in caplog.text
    assert [labelled_text(feature, context) for feature in features] == ["northern city", "river"]
    assert features[0]["context_position"] == 7
    assert tokenizer.decode(features[0]["input_ids"][1:6]) == "who is the old king"


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"max_seq_length": 24, "doc_stride": 24}, "has room for 16 context tokens .* more than doc_stride 24"),
        ({"max_seq_length": 24, "doc_stride": 16}, "more than doc_stride 16"),
        ({"max_seq_length": 8, "doc_stride": 0}, "has room for 0 context tokens"),
        ({"max_seq_length": 24, "doc_stride": -1}, "not below 0"),
        ({"max_seq_length": 65, "doc_stride": 6}, "max_seq_length is 65; expected 1 to 64"),
        ({"max_seq_length": 24, "doc_stride": 6, "max_query_length": 0}, "not below 1"),
    ],
)
def test_lengths_that_leave_no_room(lengths, message, tokenizer):
    """The error shows the sum."""
    with pytest.raises(ValueError, match=message):
        squad_features(make_examples(make_row("q", "sea", "sea")), tokenizer, **{"max_query_length": 5, **lengths})


def test_left_padding_is_refused(tmp_path):
    """The collator would shift every label."""
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="pads on the left"):
        squad_features(make_examples(make_row("q", "sea", "sea")), tokenizer, **SMALL)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"text": ["sea"], "answer_start": [99]},
            "question 'q': answer 'sea' is not at answer_start 99 .* has 11 char",
        ),
        ({"text": ["sea"], "answer_start": [-3]}, "not at answer_start -3"),
        ({"text": ["sea"], "answer_start": [0]}, "there reads 'the old sea'"),
        ({"text": ["sea", "old"], "answer_start": [8, 5]}, "'old' is not at answer_start 5"),
        ({"text": [" "], "answer_start": [3]}, "answer ' ' is not"),
        ({"text": ["sea"], "answer_start": []}, "1 answers but 0 values of answer_start"),
    ],
)
def test_answers_that_are_not_in_the_context(answers, message, tokenizer):
    """The error names the question and what stands there."""
    row = {**make_row("q", "the old sea"), "answers": answers}
    with pytest.raises(ValueError, match=message):
        squad_features(make_examples(row), tokenizer, **SMALL)


def test_context_without_tokens(tokenizer):
    """Nothing could be answered."""
    with pytest.raises(ValueError, match="context of question 'q' has no token"):
        squad_features(make_examples(make_row("q", " \n ")), tokenizer, **SMALL)


def test_load_takes_a_local_directory_in_the_layout_of_the_hub(tmp_path):
    """Rows come back as they were written."""
    rows = [make_row("a", "the old sea", "sea"), make_row("b", "the old sea")]
    name = write_squad(tmp_path / "data", validation=make_examples(*rows))
    loaded = load_squad(name, "validation", version_2_with_negative=True, cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == rows


def test_unsuitable_data(tmp_path):
    """A missing split, an unexpected unanswerable question, double ids, a missing column."""

    def load(folder, split="validation", **options):
        return load_squad(str(tmp_path / folder), split, cache_dir=str(tmp_path / "cache"), **options)

    rows = [make_row("a", "the old sea", "sea"), make_row("b", "the old sea")]
    write_squad(tmp_path / "v2", validation=make_examples(*rows))
    with pytest.raises(ValueError, match=r"no split 'train', only \['validation'\]"):
        load("v2", "train")
    with pytest.raises(ValueError, match="question 'b' .* has no answer: for SQuAD v2 set version_2_with_negative"):
        load("v2")
    write_squad(tmp_path / "double", validation=make_examples(rows[0], rows[0]))
    with pytest.raises(ValueError, match="2 rows of id 'a'; ids must be unique"):
        load("double")
    write_squad(tmp_path / "columns", validation=make_examples(rows[0]).remove_columns(["answers", "question"]))
    with pytest.raises(ValueError, match=r"lacks the columns \['question', 'answers'\]"):
        load("columns")


def articles(count, rows_each=3):
    """Questions of several articles."""
    names = [f"article {i}" for i in range(count)]
    return make_examples(*(make_row(f"{n} {i}", "the sea", "sea", title=n) for n in names for i in range(rows_each)))


def test_hold_out_keeps_articles_whole():
    """No title on both sides, nothing lost, and the choice hangs on the titles alone."""
    examples = articles(20)
    train, held_out = hold_out_articles(examples, 0.1)
    assert len(set(held_out["title"])) == 2 and not set(held_out["title"]) & set(train["title"])
    assert sorted([*train["id"], *held_out["id"]]) == sorted(examples["id"])
    again = hold_out_articles(examples.shuffle(seed=3), 0.1)[1]
    assert set(again["id"]) == set(held_out["id"])
    assert set(hold_out_articles(examples, 0.1, seed=2)[1]["title"]) != set(held_out["title"])
    assert [len(part) for part in hold_out_articles(articles(2), 0.01)] == [3, 3]
    assert [len(part) for part in hold_out_articles(articles(2), 0.99)] == [3, 3]


def test_hold_out_refuses_what_it_cannot_split():
    """One article, no titles, a fraction that is none."""
    for fraction in (0, 1, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1, got"):
            hold_out_articles(articles(3), fraction)
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        hold_out_articles(articles(1), 0.5)
    with pytest.raises(ValueError, match="needs the column 'title'"):
        hold_out_articles(articles(3).remove_columns("title"), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_real_questions(name, shared_data, tmp_path):
    """Gold answers score 100; labels of a sample give back the answers, except where these cut a word in two."""
    version_2 = name == "squad_v2"
    cache = str(tmp_path / "cache")
    examples = load_squad(str(shared_data / name), "validation", version_2_with_negative=version_2, cache_dir=cache)
    references = [{"id": n, "answers": a} for n, a in zip(examples["id"], examples["answers"], strict=True)]
    gold = [{"id": row["id"], "prediction_text": (row["answers"]["text"] or [""])[0]} for row in references]
    scores = SquadMetric().compute(predictions=gold, references=references)
    assert scores["exact_match"] == scores["f1"] == 100 and scores["total"] == len(examples)

    sample = examples.shuffle(seed=0).select(range(300))
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "bert-tiny-mlm")
    features = squad_features(sample, tokenizer)
    rows = {row["id"]: row for row in sample}
    found = {}
    for feature in features:
        row = rows[feature["example_id"]]
        if (text := labelled_text(feature, row["context"])) is not None:
            assert row["answers"]["text"][0] in text
            found[row["id"]] = text == row["answers"]["text"][0]
    assert found.keys() == {name for name, row in rows.items() if row["answers"]["text"]}
    assert np.mean(list(found.values())) > 0.98
