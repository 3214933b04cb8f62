"""Cards say what the result files and the weights say, in full precision, and refuse to say more."""

import json
from itertools import pairwise

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from mfac_hf import save_sparse
from mfac_hf.hub.card import build_card
from mfac_hf.hub.facts import CardOptions, collect
from mfac_hf.hub.latency import with_latency
from mfac_hf.hub.run_records import MissingResultsError
from tests.helpers.models import CONFIG
from tests.helpers.results import log, run


@pytest.fixture
def facts(bert, tmp_path):
    """Facts of a sparse model with two seeds, and its dense counterpart with three."""
    bert.save_pretrained(tmp_path / "sparse-90")
    reports = [{"options": {"num_grads": 64, "block_size": 128}, "sparsity": 0.9, "num_grads": 1024, "steps": []}]
    options = CardOptions(
        dense=[run(seed, accuracy) for seed, accuracy in ((1, 0.80), (2, 0.82), (3, 0.84))],
        caveats=["The BERT is not Google's."],
        license="apache-2.0",
    )
    runs = [run(seed, accuracy, {"reports": reports}) for seed, accuracy in ((1, 0.7912844036697247), (2, 0.75))]
    model = tmp_path / "sparse-90"
    return with_latency(collect(runs, model=model, options=options), model)


def test_metadata_is_parsed_back_to_the_digit(facts, tmp_path):
    path = tmp_path / "README.md"
    build_card(facts, "user/sparse-90").save(path)
    data = ModelCard.load(path).data
    (result,) = data.eval_results
    assert result.metric_value == 0.7912844036697247 and result.metric_type == "accuracy"
    assert (result.task_type, result.dataset_type) == ("text-classification", "nyu-mll/glue")
    assert (result.dataset_config, result.dataset_split) == ("sst2", "validation")
    assert data.base_model == "google/bert_uncased_L-2_H-128_A-2" and data.datasets == "nyu-mll/glue"
    assert data.license == "apache-2.0" and data.library_name == "transformers"
    assert {"sparse", "m-fac", "arxiv:2107.03356"} <= set(data.tags)


def test_text_holds_all_facts(facts, bert):
    text = str(build_card(facts, "user/sparse-90"))
    encoder = [m.weight for m in bert.bert.encoder.modules() if isinstance(m, nn.Linear)]
    sparsity = sum(int((w == 0).sum()) for w in encoder) / sum(w.numel() for w in encoder)
    for expected in (
        "| sparse | accuracy | 79.13 | 77.06 ± 2.92 | 1, 2 |",
        "| dense | accuracy | 80.00 | 82.00 ± 2.00 | 1, 2, 3 |",
        f"{sparsity:.2%}",
        "| `bert.encoder.layer.0.attention.self.query.weight` | 32 x 32 |",
        "`model.safetensors` |",
        "`sparse.safetensors` |",
        "| block_size | 128 |",
        "| optimizer | M-FAC |",
        "| metric | identity |",
        "A forward pass of 1 x 16 tokens takes",
        'AutoModelForSequenceClassification.from_pretrained("user/sparse-90")',
        'load_sparse("user/sparse-90", AutoModelForSequenceClassification)',
        "masks=masks_from_sparse_model(model)",
        "python scripts/run_glue.py --seed 3",
        "torch 2.13.0",
        "The dense model beside it was trained with M-FAC:",
        "- The BERT is not Google's.",
        "title = {{M-FAC}",
    ):
        assert expected in text, expected
    assert "adamw" not in text.lower()


def test_snippets_run(facts, bert, tmp_path, monkeypatch):
    """The code of the card, on the directory that it is about."""
    save_sparse(bert, tmp_path / "sparse-90")
    for sparse_only in (False, True):
        text = str(build_card(facts, str(tmp_path / "sparse-90"), sparse_only=sparse_only))
        assert ("from_pretrained" in text) != sparse_only
        load, finetune = (part.split("```")[0] for part in text.split("```python\n")[1:])
        scope = {}
        exec(load + finetune, scope)
        model, optimizer = scope["model"], scope["optimizer"]
        assert torch.equal(model.state_dict()["classifier.weight"], bert.state_dict()["classifier.weight"])
        assert optimizer.param_groups[0]["lr"] == 5e-5


def test_the_same_facts_give_the_same_card(facts):
    again = json.loads(json.dumps(facts))
    assert str(build_card(again, "user/x")) == str(build_card(facts, "user/x"))


def test_dense_model(tmp_path):
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**CONFIG)).save_pretrained(tmp_path / "dense")
    card = build_card(collect([run(1, 0.8)], model=tmp_path / "dense"))
    text = str(card)
    assert "| this model | accuracy | 80.00 | - | 1 |" in text and "Latency was not measured." in text
    assert "Sparsity" not in text and "load_sparse" not in text and "sparse" not in card.data.tags


def test_vision_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    with torch.no_grad():
        for weight in (model[0].weight, model[4].weight):
            weight.view(-1)[: weight.numel() // 2] = 0
    facts = collect([log()], model=model, options=CardOptions(name="net-50"))
    text = str(build_card(facts))
    assert "| sparse | accuracy | 85.00 |" in text and "| dense | accuracy | 90.00 |" in text
    assert "| 1 | 0.5 |" in text or "after 0 epochs" in text
    assert "trained with SGD from `rn20.pth`" in text
    assert "m-fac" in build_card(facts).data.tags and "title = {{M-FAC}" in text, "M-FAC chose what to prune"
    facts["runs"][0]["pruning"]["options"]["pruner"] = "mag"
    other = build_card(facts)
    assert "m-fac" not in other.data.tags and "Citation" not in str(other)


def test_missing_facts_are_refused(facts):
    for key in ("runs", "weights", "files"):
        with pytest.raises(MissingResultsError, match=f"facts of the card lack {key}"):
            build_card({**facts, key: None})


def test_latency_in_words(facts):
    times = {**facts["latency"], "seconds": {"dense": 0.02, "sparse": 0.01}, "sparse_layers": 3}
    text = str(build_card({**facts, "latency": times}))
    assert "takes 20.0 ms dense" in text and "10.0 ms after `to_sparse_inference` (3 sparse layers)" in text
    text = str(build_card({**facts, "latency": {**times, "sparse_layers": 0}}))
    assert "no layer was faster as a sparse one" in text and "10.0 ms" not in text, "the same model twice: noise"


def test_text_from_elsewhere_is_no_markup(facts):
    evil = "x|y</details>\n# Title `<script>alert(1)</script>`\n---\n"
    record = {**facts["runs"][0], "base_model": evil, "split": evil, "command": ["train.py", "```\n# Title\n---"]}
    record |= {"metrics": {evil: 0.5}, "training": {evil: evil}, "device": evil, "versions": {evil: evil}}
    record |= {"dataset": {"id": evil, "config": evil}, "optimizer": {"name": evil, "lr": evil}}
    record["pruning"] = {"options": {evil: evil}, "steps": [{evil: evil}, {"sparsity": 0.9, "other": 1}]}
    dense = {**record, "pruning": None}
    hostile = {**facts, "name": evil, "caveats": [evil], "license": evil, "runs": [record], "dense_runs": [dense]}
    hostile["weights"] = {**facts["weights"], "tensors": [{**facts["weights"]["tensors"][0], "name": evil}]}
    hostile["files"] = {evil: 3}
    card = build_card(hostile, evil)
    assert card.data.model_name.startswith("x|y</details> # Title") and card.data.license == evil
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    tokens += [inner for token in tokens for inner in token.children or []]
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert titles[1:] == ["Results", "Sparsity", "Files and speed", "Use", "Training", "Caveats"]
    html = "".join(token.content for token in tokens if token.type.startswith("html"))
    assert "script" not in html and html.count("</details>") == 1
    assert not any(token.type in ("hr", "image") for token in tokens)
    assert sum(token.type == "table_open" for token in tokens) == 7, "none is broken in two"


def test_metrics_are_in_percent_only_where_they_are_shares(facts):
    def shown(metrics, task="sst2"):
        runs = [{**one, "metrics": metrics, "task": task} for one in facts["runs"]]
        return str(build_card({**facts, "runs": runs, "dense_runs": [{**facts["dense_runs"][0], **runs[0]}]}))

    text = shown({"loss": 0.25, "perplexity": 31.5})
    assert "validation split. The weights" in text and "in percent" not in text
    assert "| sparse | loss | 0.25 | 0.25 ± 0 | 1, 2 |" in text and "| sparse | perplexity | 31.5 |" in text
    text = shown({"accuracy": 0.25, "loss": 0.25})
    assert ", in percent but for loss." in text and "| sparse | accuracy | 25.00 |" in text
    assert "| sparse | exact match | 0.50 |" in shown({"exact_match": 0.5}, "squad"), "in percent already"
    assert "| sparse | exact match | 50.00 |" in shown({"exact_match": 0.5})


def test_runs_on_several_ranks_and_commands_that_are_no_script(facts):
    def said(**changes):
        return str(build_card({**facts, "runs": [{**facts["runs"][0], **changes}]}))

    text = said(ranks=4, launcher="torchrun --nproc_per_node 4")
    assert "\ntorchrun --nproc_per_node 4 scripts/run_glue.py --seed 3\n" in text and ", ranks 4, " in text
    assert "ranks 4 (what started them is not recorded)" in said(ranks=4)
    assert "\nmfac prune user/dense\n" in said(command=["mfac", "prune", "user/dense"])


def test_files_that_are_not_pushed_are_not_loaded(facts):
    files = {name: size for name, size in facts["files"].items() if name != "sparse.safetensors"}
    text = str(build_card({**facts, "files": files}, "user/x"))
    assert "sparse.safetensors" not in text and "load_sparse" not in text
    assert 'from_pretrained("user/x")' in text and "## Sparsity" in text


def test_a_run_that_diverged_or_did_not_train_says_so(facts):
    runs = [{**facts["runs"][0], "metrics": {}, "not_finite": ["accuracy"]}]
    text = str(build_card({**facts, "runs": runs, "dense_runs": []}))
    assert "The evaluation gave no finite number for accuracy: the run diverged." in text
    runs = [{**facts["runs"][0], "optimizer": {"name": "none: the model was not trained in this run"}}]
    assert "BertForSequenceClassification, not trained in this run from `google/bert" in str(
        build_card({**facts, "runs": runs})
    )


def test_steps_of_different_kinds_share_a_table(facts):
    steps = [{"step": 1, "sparsity": 0.5}, {"step": 2, "sparsity": 0.9, "damping": [1e-4]}]
    runs = [{**facts["runs"][0], "pruning": {"options": {"num_grads": 64}, "steps": steps}}]
    text = str(build_card({**facts, "runs": runs}))
    assert "| step | sparsity | damping |\n| --- | --- | --- |\n| 1 | 0.5 |  |\n| 2 | 0.9 | 0.0001 |" in text
