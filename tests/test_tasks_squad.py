"""SQuAD: data, features, answers and metric, on synthetic data and, where there is some, on real data."""

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer, EvalPrediction

from mfac_hf.tasks.squad import NULL_POSITION, hold_out_articles, load_squad, squad_features
from mfac_hf.tasks.squad_answers import SquadEvaluation, extract_answers
from mfac_hf.tasks.squad_metric import SquadMetric, best_null_threshold, normalize_answer, score_answer

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


# ---------------------------------------------------------------------------------------------------------- features


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


# -------------------------------------------------------------------------------------------------------------- data


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


# ----------------------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def case(tokenizer):
    """Questions with one and with several windows, answerable and not, and their features."""
    rng = np.random.default_rng(5)
    rows = []
    for i, length in enumerate((4, 50, 12, 30, 9, 40)):
        words = list(rng.choice(WORDS, length))
        words[length // 2 : length // 2 + 2] = ["golden", "northern"]
        rows.append(make_row(f"q{i}", " ".join(words), "golden northern" if i % 3 else None))
    examples = make_examples(*rows)
    return examples, squad_features(examples, tokenizer, **SMALL)


def make_logits(features, seed=0, width=3):
    """Random logits, wider than the longest feature as after gathering: the surplus holds Trainer's -100."""
    longest = max(len(ids) for ids in features["input_ids"])
    logits = np.random.default_rng(seed).normal(size=(2, len(features), longest + width)).astype(np.float32)
    for row, ids in enumerate(features["input_ids"]):
        logits[:, row, len(ids) :] = -100
    return logits


def naive_spans(features, name, start_logits, end_logits, max_answer_length):
    """All spans of a question with their best score, by the plainest loops."""
    spans = {}
    for row, feature in enumerate(features):
        if feature["example_id"] != name:
            continue
        shift, count = feature["context_position"], len(feature["token_starts"])
        for i in range(count):
            for j in range(i, min(i + max_answer_length, count)):
                key = (feature["token_starts"][i], feature["token_ends"][j])
                score = float(start_logits[row, shift + i] + end_logits[row, shift + j])
                spans[key] = max(spans.get(key, -1e9), score)
    return sorted(((score, -start, end) for (start, end), score in spans.items()), reverse=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n_best_size", "max_answer_length"), [(20, 30), (3, 4), (1, 1), (500, 2)])
def test_answers_are_the_best_spans_of_all_windows(seed, n_best_size, max_answer_length, case):
    """Against brute force; so no answer is reversed, too long, or outside the context."""
    examples, features = case
    start_logits, end_logits = make_logits(features, seed)
    # the question would win if it were allowed to
    for row, position in enumerate(features["context_position"]):
        start_logits[row, 1:position] = end_logits[row, 1:position] = 50
    found = extract_answers(
        examples, features, start_logits, end_logits, n_best_size=n_best_size, max_answer_length=max_answer_length
    )
    contexts = dict(zip(examples["id"], examples["context"], strict=True))
    assert found.texts.keys() == found.nbest.keys() == contexts.keys() and found.null_score_diffs == {}
    for name, entries in found.nbest.items():
        expected = naive_spans(features, name, start_logits, end_logits, max_answer_length)
        assert [entry["score"] for entry in entries] == [score for score, *_ in expected[:n_best_size]]
        assert [entry["text"] for entry in entries] == [contexts[name][-s:e] for _, s, e in expected[:n_best_size]]
        assert found.texts[name] == entries[0]["text"] == found.best_spans[name] != ""
        assert all(contexts[name].startswith(entry["text"], entry["start"]) for entry in entries)
        scores = np.exp([entry["score"] for entry in entries])
        np.testing.assert_allclose([entry["probability"] for entry in entries], scores / scores.sum(), rtol=1e-6)


@pytest.mark.parametrize("version_2", [False, True])
def test_logits_at_the_labels_give_back_the_gold_answers(version_2, case):
    """A perfect model scores 100, also over several windows of which only some hold the answer."""
    examples, features = case
    if not version_2:
        keep = [i for i, answers in enumerate(examples["answers"]) if answers["text"]]
        names = [examples["id"][i] for i in keep]
        examples = examples.select(keep)
        features = features.filter(lambda row: row["example_id"] in names)
    logits = np.zeros((2, len(features), SMALL["max_seq_length"]), dtype=np.float32)
    for part, column in zip(logits, ("start_positions", "end_positions"), strict=True):
        part[np.arange(len(features)), features[column][:]] = 10
    labels = (np.array(features["start_positions"][:]), np.array(features["end_positions"][:]))
    scores = SquadEvaluation(examples, features, version_2_with_negative=version_2)(
        EvalPrediction(tuple(logits), labels)
    )
    assert scores["exact_match"] == scores["f1"] == 100 and scores["total"] == len(examples)
    assert ("NoAns_f1" in scores) == version_2 and scores.get("NoAns_f1", 100) == 100


def test_null_wins_in_version_2_when_it_is_better_than_the_threshold(case):
    """The null score is the least over the windows; the best span stays in the list."""
    examples, features = case
    start_logits, end_logits = make_logits(features, 1)

    def answers(threshold, **options):
        return extract_answers(
            examples, features, start_logits, end_logits, null_score_diff_threshold=threshold, **options
        )

    plain, found = answers(0.0), answers(0.0, version_2_with_negative=True)
    assert set(plain.texts.values()).isdisjoint({""}) and found.best_spans == plain.texts
    for name, diff in found.null_score_diffs.items():
        rows = [row for row, of in enumerate(features["example_id"]) if of == name]
        null = min(start_logits[row, 0] + end_logits[row, 0] for row in rows)
        assert diff == pytest.approx(float(null) - plain.nbest[name][0]["score"], abs=1e-6)
        assert found.texts[name] == ("" if diff > 0 else plain.texts[name])
        # at the threshold itself the answer stays
        assert answers(diff, version_2_with_negative=True).texts[name] == plain.texts[name]
        below = answers(np.nextafter(diff, -np.inf), version_2_with_negative=True)
        assert below.texts[name] == "" and below.best_spans[name] == plain.texts[name]
        entries = found.nbest[name]
        assert [entry["start"] for entry in entries].count(None) == 1
        assert sorted(entries, key=lambda entry: -entry["score"]) == entries
        assert sum(entry["probability"] for entry in entries) == pytest.approx(1)
    assert answers(-100.0, version_2_with_negative=True).texts == dict.fromkeys(plain.texts, "")


def test_logits_that_do_not_fit(case):
    """Shape, NaN, limits, and features of other questions are all named."""
    examples, features = case
    start_logits, end_logits = make_logits(features)

    def answers(examples=examples, features=features, start=start_logits, end=end_logits, **options):
        return extract_answers(examples, features, start, end, **options)

    with pytest.raises(ValueError, match=f"start_logits have shape .* expected {len(features)} features of >= 23"):
        answers(start=start_logits[:-1])
    with pytest.raises(ValueError, match="end_logits have shape"):
        answers(end=end_logits[:, :20])
    with pytest.raises(ValueError, match="end_logits have shape"):
        answers(end=end_logits[0])
    broken = start_logits.copy()
    broken[2, 3] = np.nan
    with pytest.raises(ValueError, match="1 of .* start_logits are not finite"):
        answers(start=broken)
    with pytest.raises(ValueError, match="n_best_size 0"):
        answers(n_best_size=0)
    with pytest.raises(ValueError, match="max_answer_length 0"):
        answers(max_answer_length=0)
    with pytest.raises(ValueError, match="differ in 1 of 5 ids, for instance 'q5'"):
        answers(examples=examples.select(range(5)))
    with pytest.raises(ValueError, match="differ in 1 of 6 ids, for instance 'q0'"):
        answers(features=features.filter(lambda row: row["example_id"] != "q0"))


def test_evaluation_refuses_reordered_features(case):
    """Labels that come back in another order mean logits of other questions."""
    examples, features = case
    evaluation = SquadEvaluation(examples, features, version_2_with_negative=True)
    logits = tuple(make_logits(features))
    labels = np.array([features["start_positions"][:], features["end_positions"][:]])
    evaluation(EvalPrediction(logits, tuple(labels)))
    with pytest.raises(ValueError, match="not those of the .* features in their order"):
        evaluation(EvalPrediction(logits, tuple(labels[:, ::-1])))
    with pytest.raises(ValueError, match="not those of the"):
        evaluation(EvalPrediction(logits, tuple(labels[:, 1:])))


# ------------------------------------------------------------------------------------------------------------ metric


def compute(predictions, references):
    """Score ``{id: text}`` against ``{id: [text, ...]}``."""
    return SquadMetric().compute(
        predictions=[{"id": name, "prediction_text": text} for name, text in predictions.items()],
        references=[{"id": n, "answers": {"text": t, "answer_start": [0] * len(t)}} for n, t in references.items()],
    )


def test_published_examples():
    """The examples of the metric cards of ``evaluate-metric/squad`` and ``squad_v2`` on the Hub."""
    references = {
        "56e10a3be3433e1400422b22": ["1976"],
        "56d2051ce7d4791d0090260b": ["Beyoncé and Bruno Mars"],
        "5733b5344776f419006610e1": ["climate change"],
    }
    predictions = dict(zip(references, ("1976", "Beyonce", "climate change"), strict=True))
    first = next(iter(references))
    assert compute({first: "1976"}, {first: ["1976"]}) == {"exact_match": 100.0, "f1": 100.0, "total": 1}
    assert compute({first: "1999"}, {first: ["1976"]}) == {"exact_match": 0.0, "f1": 0.0, "total": 1}
    assert compute(predictions, references) == pytest.approx(
        {"exact_match": 66.66666666666667, "f1": 66.66666666666667, "total": 3}
    )


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The  Denver Broncos!", ["denver broncos"], 1, 1),
        # 2 of 3 and 2 of 2 words in common: 2 * 2 / (3 + 2)
        ("Denver Broncos team", ["Denver Broncos"], 0, 0.8),
        # a word that occurs once counts once: 2 * 1 / (3 + 1)
        ("new new new", ["new"], 0, 0.5),
        # punctuation goes before articles and joins words: "a.b" is "ab", and "theatre" is no article
        ("a.b theatre", ["ab theatre"], 1, 1),
        ("U.S.", ["the US"], 1, 1),
        # each measure takes its own best reference: 2 * 2 / (2 + 3)
        ("gold coast", ["gold", "the gold coast city"], 0, 0.8),
        ("café", ["cafe"], 0, 0),
        ("", ["sea"], 0, 0),
        ("sea", [], 0, 0),
        ("", [], 1, 1),
        # what normalises to nothing is an empty answer
        ("The", [], 1, 1),
        (".", ["."], 1, 1),
        ("", ["the", "sea"], 0, 0),
    ],
)
def test_scores_computed_by_hand(prediction, answers, exact, f1):
    """Normalisation, multiset overlap, several references, empty answers."""
    assert score_answer(prediction, answers) == pytest.approx((exact, f1))


def test_normalisation():
    """Case, punctuation, articles as whole words, white space."""
    assert normalize_answer("  An\tApple, a day\nkeeps THE  'doctor' away! ") == "apple day keeps doctor away"
    assert normalize_answer("anthem and another") == "anthem and another"


def test_break_down_of_version_2():
    """Headline over all questions, and apart over those with and without an answer."""
    references = {"a": ["sea"], "b": ["old king", "king"], "c": [], "d": []}
    scores = compute({"d": "king", "b": "old king now", "a": "sea", "c": ""}, references)
    assert scores == pytest.approx(
        {
            **{"exact_match": 50, "f1": 70, "total": 4},
            **{"HasAns_exact_match": 50, "HasAns_f1": 90, "HasAns_total": 2},
            **{"NoAns_exact_match": 50, "NoAns_f1": 50, "NoAns_total": 2},
        }
    )
    assert not any(name.startswith("HasAns") for name in compute({"c": ""}, {"c": []}))


def test_predictions_and_references_must_pair():
    """A missing, a surplus and a double id."""
    with pytest.raises(ValueError, match="no prediction for 1 of 2 questions, for instance id 'b'"):
        compute({"a": "sea", "c": "sea"}, {"a": ["sea"], "b": ["sea"]})
    # evaluate itself refuses another number of them
    with pytest.raises(ValueError, match=r"predictions \(1\) and references \(2\)"):
        compute({"a": "sea"}, {"a": ["sea"], "b": ["sea"]})
    row = {"id": "a", "prediction_text": "sea"}
    reference = {"id": "a", "answers": {"text": ["sea"], "answer_start": [0]}}
    with pytest.raises(ValueError, match="predictions have 2 rows of id 'a'"):
        SquadMetric().compute(predictions=[row, row], references=[reference, {**reference, "id": "b"}])
    with pytest.raises(ValueError, match="references have 2 rows of id 'a'"):
        SquadMetric().compute(predictions=[row, {**row, "id": "b"}], references=[reference, reference])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sea", "old sea", "king"]), st.sampled_from([[], ["sea"], ["king"]]), st.integers(-3, 3)
        ),
        min_size=1,
        max_size=8,
    )
)
def test_best_threshold_is_the_best_of_all(rows):
    """Against trying every threshold, with ties; applying what is returned gives the promised score."""
    spans = {str(i): span for i, (span, _, _) in enumerate(rows)}
    gold = {str(i): answers for i, (_, answers, _) in enumerate(rows)}
    diffs = {str(i): float(diff) for i, (_, _, diff) in enumerate(rows)}
    references = [{"id": n, "answers": {"text": t, "answer_start": [0] * len(t)}} for n, t in gold.items()]

    def mean(threshold):
        said = {name: "" if diffs[name] > threshold else spans[name] for name in spans}
        return 100 * np.mean([score_answer(said[name], gold[name]) for name in spans], axis=0)

    found = best_null_threshold(spans, diffs, references)
    everything = np.array([mean(threshold) for threshold in np.arange(-3.5, 4)])
    for column, name in enumerate(("best_exact_match", "best_f1")):
        assert found[name] == pytest.approx(everything[:, column].max())
        assert mean(found[f"{name}_threshold"])[column] == pytest.approx(found[name])


def test_threshold_search_refuses_what_does_not_pair():
    """Other ids, NaN, nothing."""
    reference = {"id": "a", "answers": {"text": ["sea"], "answer_start": [0]}}
    with pytest.raises(ValueError, match="no prediction for 1 of 1"):
        best_null_threshold({"a": "sea"}, {}, [reference])
    with pytest.raises(ValueError, match="no reference for 1 of 1 questions, for instance id 'b'"):
        best_null_threshold({"a": "sea", "b": "sea"}, {"a": 0.0}, [reference])
    with pytest.raises(ValueError, match="question a is NaN"):
        best_null_threshold({"a": "sea"}, {"a": float("nan")}, [reference])
    with pytest.raises(ValueError, match="no references"):
        best_null_threshold({}, {}, [])


# --------------------------------------------------------------------------------------------------------- real data


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
