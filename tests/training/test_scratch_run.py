"""What is held out of a generated training split; runs from end to end are in tests of the scripts that make them."""

import pytest
from datasets import Dataset

from mfac_hf.training.scratch_run import hold_out


def test_the_validation_split_stays_out_of_tuning():
    train, validation = (Dataset.from_dict({"x": list(range(start, start + 10))}) for start in (0, 100))
    assert hold_out(train, validation, None) == (train, validation)
    rest, held_out = hold_out(train, validation, 0.3)
    assert (rest["x"][:], held_out["x"][:]) == (list(range(7)), [7, 8, 9])


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.04, -0.5])
def test_both_parts_have_examples(fraction):
    train = Dataset.from_dict({"x": list(range(10))})
    with pytest.raises(ValueError, match=f"--holdout_fraction {fraction}: of 10 training examples"):
        hold_out(train, train, fraction)
