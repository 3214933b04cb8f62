"""All files of a tokenizer and all code of a model's own are pushed with it, and nothing else."""

import json

import pytest
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from mfac_hf.hub.card import build_card
from mfac_hf.hub.companions import custom_architecture, find_companions
from mfac_hf.hub.facts import collect
from mfac_hf.hub.latency import with_latency
from tests.helpers.models import CONFIG
from tests.helpers.results import run

MODELING = """
from transformers import BertForSequenceClassification
from .helper_own import LEVELS
class OwnForSequenceClassification(BertForSequenceClassification):
    levels = LEVELS
"""


@pytest.fixture
def own(tmp_path):
    """A model whose class is code of its own, which imports from beside; the training left other files there."""
    folder = tmp_path / "own"
    BertForSequenceClassification(BertConfig(**CONFIG)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["OwnForSequenceClassification"]
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(MODELING)
    (folder / "helper_own.py").write_text("from .deeper import LEVELS\n")
    (folder / "deeper.py").write_text("LEVELS = 3\n")
    for name in ("train.py", "secrets.json", ".env", "optimizer.pt", "dict.txt"):
        (folder / name).write_text("{}")
    return folder


def test_code_of_a_model_is_found_with_what_it_imports(own):
    code = {"modeling_own.py", "helper_own.py", "deeper.py"}
    assert set(find_companions(own)) == {"config.json", *code}


def test_the_card_says_that_the_model_runs_code_of_its_own(own):
    # transformers before 5.16 copies what the first file imports and not what that imports, so this one names all.
    (own / "modeling_own.py").write_text(MODELING + "from .deeper import LEVELS\n")
    facts = with_latency(collect([run(1, 0.8)], model=own), own)
    assert facts["latency"] is None, "measuring it would run the code"
    card = build_card(facts, "user/own")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-classification"
    call = 'AutoModelForSequenceClassification.from_pretrained("user/own", trust_remote_code=True)'
    assert call in str(card) and "OwnForSequenceClassification, trained with" in str(card)
    loaded = AutoModelForSequenceClassification.from_pretrained(own, trust_remote_code=True)
    assert type(loaded).levels == 3
    assert collect([run(1, 0.8)], model=loaded)["model"] == facts["model"]


def test_missing_code_is_refused_by_name(own):
    (own / "deeper.py").unlink()
    with pytest.raises(FileNotFoundError, match="deeper.py"):
        find_companions(own)
    (own / "modeling_own.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json needs modeling_own.py .*OwnForSequenceClassification"):
        find_companions(own)
    config = json.loads((own / "config.json").read_text())
    for name in ("../x.Own", "a/b.Own"):
        config["auto_map"] = {"AutoModel": name}
        (own / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="auto_map names"):
            find_companions(own)


def test_code_elsewhere_and_classes_of_transformers_need_no_file(own):
    config = json.loads((own / "config.json").read_text())
    config["auto_map"] = {
        "AutoModelForSequenceClassification": "user/other--modeling_own.OwnForSequenceClassification"
    }
    (own / "config.json").write_text(json.dumps(config))
    assert set(find_companions(own)) == {"config.json"}
    assert custom_architecture(config)["custom_code"]
    config |= {"auto_map": {"AutoModel": "gone.Model"}, "architectures": ["BertForSequenceClassification"]}
    (own / "config.json").write_text(json.dumps(config))
    assert set(find_companions(own)) == {"config.json"} and custom_architecture(config) is None
    assert custom_architecture(BertConfig().to_dict()) is None


@pytest.mark.parametrize(
    ("tokenizer_class", "names"),
    [
        ("MarianTokenizer", ["source.spm", "target.spm", "vocab.json", "target_vocab.json"]),
        ("PhobertTokenizer", ["vocab.txt", "bpe.codes"]),
        ("DebertaV2TokenizerFast", ["spm.model", "tokenizer.json"]),
        ("WhisperTokenizer", ["vocab.json", "merges.txt", "normalizer.json"]),
        ("ByT5Tokenizer", []),
        (None, ["tokenizer.json", "additional_chat_templates/tool.jinja", "chat_template.jinja"]),
    ],
)
def test_files_of_any_tokenizer(tokenizer_class, names, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    for name in (*names, "vocab_of_another.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert set(find_companions(tmp_path)) == {"tokenizer_config.json", *names}


def test_files_of_a_tokenizer_of_its_own(tmp_path):
    config = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    code = "raise SystemExit('not run')\nclass OwnTokenizer:\n    vocab_files_names = {'vocab_file': 'own.words'}\n"
    (tmp_path / "tokenization_own.py").write_text(code)
    for name in ("own.words", "other.words"):
        (tmp_path / name).write_text("x")
    assert set(find_companions(tmp_path)) == {"tokenizer_config.json", "tokenization_own.py", "own.words"}
    (tmp_path / "tokenization_own.py").write_text("def (")
    with pytest.raises(ValueError, match="tokenization_own.py is no Python file"):
        find_companions(tmp_path)


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"auto_map": [1]}', '{"auto_map": {"AutoModel": 3}}', '{"architectures": "x"}']
)
def test_malformed_configurations_are_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        find_companions(tmp_path)
