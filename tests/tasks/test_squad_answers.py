"""SQuAD: from logits to answers, against brute force on synthetic data."""

import numpy as np
import pytest
from transformers import EvalPrediction

from mfac_hf.tasks.squad import squad_features
from mfac_hf.tasks.squad_answers import AnswerOptions, SquadEvaluation, extract_answers
from tests.helpers.squad_data import SMALL, WORDS, make_examples, make_row, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The synthetic tokenizer."""
    return make_tokenizer(tmp_path_factory.mktemp("vocab"))


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
    options = AnswerOptions(n_best_size=n_best_size, max_answer_length=max_answer_length)
    found = extract_answers(examples, features, start_logits, end_logits, options)
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
    scores = SquadEvaluation(examples, features, AnswerOptions(version_2_with_negative=version_2))(
        EvalPrediction(tuple(logits), labels)
    )
    assert scores["exact_match"] == scores["f1"] == 100 and scores["total"] == len(examples)
    assert ("NoAns_f1" in scores) == version_2 and scores.get("NoAns_f1", 100) == 100


def test_null_wins_in_version_2_when_it_is_better_than_the_threshold(case):
    """The null score is the least over the windows; the best span stays in the list."""
    examples, features = case
    start_logits, end_logits = make_logits(features, 1)

    def answers(threshold, **options):
        chosen = AnswerOptions(null_score_diff_threshold=threshold, **options)
        return extract_answers(examples, features, start_logits, end_logits, chosen)

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
        return extract_answers(examples, features, start, end, AnswerOptions(**options))

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
    evaluation = SquadEvaluation(examples, features, AnswerOptions(version_2_with_negative=True))
    logits = tuple(make_logits(features))
    labels = np.array([features["start_positions"][:], features["end_positions"][:]])
    evaluation(EvalPrediction(logits, tuple(labels)))
    with pytest.raises(ValueError, match="not those of the .* features in their order"):
        evaluation(EvalPrediction(logits, tuple(labels[:, ::-1])))
    with pytest.raises(ValueError, match="not those of the"):
        evaluation(EvalPrediction(logits, tuple(labels[:, 1:])))
