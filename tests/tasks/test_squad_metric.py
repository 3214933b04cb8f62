"""SQuAD's metric and the search for a null threshold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_hf.tasks.squad_metric import SquadMetric, best_null_threshold, normalize_answer, score_answer


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
