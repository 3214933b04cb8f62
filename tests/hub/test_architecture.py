"""The class of a model is found, and loads it."""

import json

import pytest
from torch import nn

from mfac_hf import save_sparse
from mfac_hf.hub.architecture import describe_architecture, load_model
from mfac_hf.models import ResNetCifar
from tests.helpers.sparse_files import assert_same_state


def test_classes_of_transformers_and_of_ours(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    expected = {"class": "transformers.BertForSequenceClassification", "library": "transformers"}
    expected["task"] = "text-classification"
    assert describe_architecture(bert) == describe_architecture(tmp_path) == expected
    ours = describe_architecture(ResNetCifar(20, 10))
    assert (ours["library"], ours["task"]) == ("mfac_hf", "image-classification")
    assert describe_architecture(tmp_path, ours["class"]) == ours, "the class that is given comes first"


def test_a_model_without_a_class_is_refused(tmp_path):
    save_sparse(nn.Linear(3, 3), tmp_path)
    with pytest.raises(ValueError, match="does not say of which class it is"):
        describe_architecture(tmp_path)
    with pytest.raises(ValueError, match="'mfac_hf.nothing.Net' cannot be imported"):
        describe_architecture(tmp_path, "mfac_hf.nothing.Net")


@pytest.mark.parametrize("sparse_only", [False, True])
def test_either_file_gives_the_model_for_inference(sparse_only, bert, tmp_path):
    save_sparse(bert, tmp_path, sparse_only=sparse_only)
    loaded = load_model(tmp_path, "transformers.BertForSequenceClassification")
    assert_same_state(loaded.state_dict(), bert.state_dict())
    assert not loaded.training


def test_a_class_without_a_configuration_needs_the_ordinary_file(tmp_path):
    save_sparse(ResNetCifar(20, 10), tmp_path, sparse_only=True)
    with pytest.raises(ValueError, match="has the sparse file alone: add the dense one"):
        load_model(tmp_path, "mfac_hf.models.ResNetCifar")


def test_a_configuration_names_model_classes_alone(tmp_path):
    for name in ("Trainer", "pipeline"):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        with pytest.raises(ValueError, match=f"names {name}, which is no model class"):
            describe_architecture(tmp_path)
    for path in ("os.system", "transformers.Trainer"):
        with pytest.raises(ValueError, match=f"'{path}' is no model class"):
            load_model(tmp_path, path)
