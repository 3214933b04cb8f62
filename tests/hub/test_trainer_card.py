"""A Trainer to which our card is attached leaves it on the Hub, however it pushes; another one leaves its own."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub.hf_api
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download, try_to_load_from_cache
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from mfac_hf import MFAC, SparsitySchedule, attach_card, load_sparse, push_to_hub
from mfac_hf.callbacks import MFACLoggingCallback
from mfac_hf.defaults import MFAC_DEFAULTS
from mfac_hf.hub import trainer_card
from mfac_hf.hub.trainer_card import _last_evaluation, facts_of_trainer
from mfac_hf.pruning import MFACPruningCallback
from tests.helpers.glue_data import make_tokenizer, write_glue
from tests.helpers.hub_server import TOKEN, Repository, running_hub
from tests.helpers.models import CONFIG, prune
from tests.helpers.sparse_files import assert_same_state

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch):
    """A Hub that Trainer talks to."""
    with running_hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # transformers has had a client of its own since 5.10; before, it used that of huggingface_hub's functions.
        client = getattr(transformers.utils.hub, "hf_api", lambda: huggingface_hub.hf_api.api)()
        monkeypatch.setattr(client, "endpoint", server.url)
        monkeypatch.setattr(client, "token", TOKEN)
        yield server


def make_trainer(model, tmp_path, optimizer=None, **options):
    """A Trainer on random sentences that pushes to user/run."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(0, 60, (8,), generator=generator), "labels": torch.tensor(i % 2)}
        for i in range(24)
    ]
    settings = dict(
        push_to_hub=True, hub_model_id="user/run", max_steps=4, per_device_train_batch_size=4, report_to="none"
    )
    settings |= dict(use_cpu=True, save_strategy="no", disable_tqdm=True, hub_strategy="end", seed=5)
    return Trainer(
        model,
        TrainingArguments(str(tmp_path / "run"), **{**settings, **options}),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        optimizers=(optimizer, None),
    )


def card_on(hub, branch="main"):
    """The card of user/run."""
    return ModelCard(hub.repositories["user/run"].branches[branch]["README.md"].decode())


@pytest.mark.slow
@pytest.mark.parametrize("attach", [[attach_card], [MFACLoggingCallback.attach], [attach_card, attach_card]])
def test_trainer_pushes_our_card(attach, hub, bert, tmp_path):
    trainer = make_trainer(bert, tmp_path, MFAC(bert.parameters(), metric="identity", lr=1e-3, num_grads=8))
    for one in attach:
        one(trainer)
    before = len(trainer.callback_handler.callbacks)
    trainer.train()
    assert len(trainer.callback_handler.callbacks) == before
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.push_to_hub(license="mit")
    text = str(card_on(hub))
    assert f"| this model | accuracy | {100 * accuracy:.2f} |" in text  # training without masks filled the zeros
    assert "| optimizer | M-FAC |" in text and "| num_grads | 8 |" in text and "| lr | 0.001 |" in text
    assert "adamw" not in text.lower() and "generated_from_trainer" not in text
    assert "from_pretrained" in text and "load_sparse" not in text, "Trainer pushes no sparse file"
    assert card_on(hub).data.license == "mit"
    assert "model.safetensors" in hub.repositories["user/run"].branches["main"]


@pytest.mark.slow
@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs"])
def test_the_card_tells_the_metric_and_its_settings_alone(given, bert, tmp_path):
    """Weight decay is the groups' own: Trainer makes them, of ``TrainingArguments.weight_decay`` and zero."""
    trainer = make_trainer(
        bert, tmp_path, MFAC(bert.parameters(), lr=1e-3, nesterov=False), push_to_hub=False, weight_decay=0.25
    )
    if given == "optimizer_cls_and_kwargs":
        options = {
            "train_dataset": trainer.train_dataset,
            "optimizer_cls_and_kwargs": (MFAC, {"lr": 1e-3, "nesterov": False}),
        }
        trainer = Trainer(bert, trainer.args, **options)
    attach_card(trainer)
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "trained with M-FAC in Adam's metric" in text
    decay = "0.25" if given == "optimizer_cls_and_kwargs" else "0.01"
    expected = {**MFAC_DEFAULTS["adam"], "metric": "adam", "lr": 1e-3, "weight_decay": decay, "nesterov": False}
    for name, value in expected.items():
        shown = f"{value:g}" if isinstance(value, float) else value
        assert f"| {name} | {shown} |" in text, name
    assert "momentum" not in text and "grad_decay" not in text


@pytest.mark.slow
@pytest.mark.parametrize("callback", [None, MFACLoggingCallback])
def test_a_trainer_without_our_card_pushes_its_own(callback, hub, bert, tmp_path):
    """Neither the optimizer nor a callback that was merely added changes what a trainer writes."""
    trainer = make_trainer(bert, tmp_path, MFAC(bert.parameters(), metric="identity", lr=1e-3, num_grads=8))
    if callback is not None:
        trainer.add_callback(callback())
    trainer.train()
    trainer.push_to_hub()
    assert "generated_from_trainer" in str(card_on(hub)) and "M-FAC" not in str(card_on(hub))


@pytest.mark.slow
def test_pruning_callback_pushes_a_card_of_the_sparse_model(hub, tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**CONFIG))
    trainer = make_trainer(model, tmp_path, MFAC(model.parameters(), metric="identity", lr=1e-3, num_grads=8))
    schedule = SparsitySchedule.from_list([0.5, 0.75], every=1, unit="step")
    MFACPruningCallback(schedule, num_grads=4, block_size=16, recomputations=1).attach(trainer)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    text = str(card_on(hub))
    assert "75.00%" in text and "| block_size | 16 |" in text and "| recomputations | 1 |" in text
    assert "The dense model was not measured beside it." in text and "| optimizer | M-FAC |" in text


@pytest.mark.slow
def test_card_before_an_evaluation_says_so(hub, bert, tmp_path):
    """Trainer also pushes at each save and from save_model, when there may be nothing to say yet."""
    options = dict(hub_strategy="every_save", save_strategy="steps", save_steps=2)
    trainer = make_trainer(bert, tmp_path, MFAC(bert.parameters(), metric="identity", lr=1e-3, num_grads=8), **options)
    attach_card(trainer)
    trainer.train()
    trainer.save_model()
    assert "had not been evaluated" in str(card_on(hub)) and "| optimizer | M-FAC |" in str(card_on(hub))
    trainer.evaluate()
    trainer.push_to_hub()
    assert "had not been evaluated" not in str(card_on(hub))


def test_options_and_sparse_models(hub, bert, tmp_path):
    dense = {"seed": 1, "metrics": {"accuracy": 0.9}, "task": None, "split": "evaluation", "dataset": None}
    dense |= {"command": ["train.py"], "versions": {"torch": "2"}, "device": "cpu", "optimizer": {"name": "SGD"}}
    trainer = make_trainer(bert, tmp_path, torch.optim.SGD(bert.parameters(), lr=0.0))
    attach_card(trainer, caveats=["Random data."], dense=[dense])
    attach_card(trainer)  # adds nothing, and takes nothing away
    with pytest.raises(TypeError, match="licence"):
        attach_card(trainer, licence="mit")
    trainer.evaluate()
    trainer.push_to_hub()
    text = str(card_on(hub))
    assert "- Random data." in text and "| dense | accuracy | 90.00 |" in text and "## Sparsity" in text


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushed_checkpoints_bring_the_card(strategy, hub, bert, tmp_path):
    """Trainer writes no card of its own when it pushes a checkpoint."""
    trainer = make_trainer(bert, tmp_path, hub_strategy=strategy, save_strategy="steps", save_steps=2)
    attach_card(trainer)
    trainer.train()  # ends when the pushes have
    assert hub.repositories["user/run"].commits and "End of training" not in hub.repositories["user/run"].commits
    assert "| optimizer | AdamW |" in str(card_on(hub)) and "generated_from_trainer" not in str(card_on(hub))


def test_push_to_hub_takes_a_trainer(hub, bert, tmp_path):
    """Its model arrives with the small file, the card is that of the trainer, and later pushes keep to it."""
    trainer = make_trainer(bert, tmp_path, torch.optim.SGD(bert.parameters(), lr=0.0))
    accuracy = trainer.evaluate()["eval_accuracy"]
    api = HfApi(endpoint=hub.url, token=TOKEN)
    push_to_hub(trainer, "user/other", api=api, revision="v1")
    files = hub.repositories["user/other"].branches["v1"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "sparse.safetensors"}
    text = files["README.md"].decode()
    assert f"| sparse | accuracy | {100 * accuracy:.2f} |" in text and "| optimizer | SGD |" in text
    assert 'load_sparse("user/other", ' in text and "# other" in text
    (tmp_path / "sparse.safetensors").write_bytes(files["sparse.safetensors"])
    assert_same_state(load_sparse(tmp_path), bert.state_dict())
    push_to_hub(trainer, "user/other", card=ModelCard("---\nlicense: mit\n---\n# Mine\n"), api=api)
    assert "# Mine" in hub.repositories["user/other"].branches["main"]["README.md"].decode()
    trainer.push_to_hub()
    assert "| optimizer | SGD |" in str(card_on(hub))


def test_push_to_hub_refuses_what_is_no_model(hub, bert, tmp_path):
    trainer = make_trainer(bert, tmp_path)
    with pytest.raises(ValueError, match="repo_id 'a/b/c' is no valid name"):
        push_to_hub(trainer, "a/b/c")
    with pytest.raises(TypeError, match="cannot push a dict; expected a model, a directory or a Trainer"):
        push_to_hub({}, "user/x")
    with pytest.raises(TypeError, match="card is missing"):
        push_to_hub(bert, "user/x")
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="spread over ranks"):
        push_to_hub(trainer, "user/x")
    trainer.is_fsdp_enabled = False
    trainer.push_to_hub()
    assert "generated_from_trainer" in str(card_on(hub)), "refused, and nothing attached"


def test_other_trainers_keep_their_card(hub, bert, tmp_path):
    ours = make_trainer(bert, tmp_path)
    MFACLoggingCallback.attach(ours)
    ours.push_to_hub()
    other = make_trainer(bert, tmp_path)
    other.push_to_hub()
    assert "generated_from_trainer" in str(card_on(hub))
    ours.push_to_hub()
    assert "generated_from_trainer" not in str(card_on(hub))


def test_a_trainer_with_a_card_of_its_own_keeps_it(bert, tmp_path):
    """As those of libraries that build on Trainer: the optimizer alone does not replace what they wrote."""

    class OwnCard(Trainer):
        def create_model_card(self, *args, **kwargs):
            raise NotImplementedError

    trainer = make_trainer(
        bert, tmp_path, MFAC(bert.parameters(), metric="identity", lr=1e-3, num_grads=8), push_to_hub=False
    )
    trainer.__class__ = OwnCard
    trainer.train()
    assert trainer.create_model_card.__func__ is OwnCard.create_model_card


def test_last_evaluation_is_that_of_the_weights():
    def history(*entries):
        return [dict(step=step, **{name: value}) for step, name, value in entries]

    state = TrainerState(global_step=20, best_global_step=10)
    state.log_history = history((10, "eval_accuracy", 0.9), (20, "eval_accuracy", 0.8), (20, "train_runtime", 1.0))
    assert _last_evaluation(state, load_best=False) == {"accuracy": 0.8}
    assert _last_evaluation(state, load_best=True) == {"accuracy": 0.9}
    state.log_history += history((20, "eval_accuracy", 0.91))
    assert _last_evaluation(state, load_best=True) == _last_evaluation(state, load_best=False) == {"accuracy": 0.91}
    state = TrainerState(global_step=20)
    state.log_history = history((10, "eval_accuracy", 0.9))
    assert _last_evaluation(state, load_best=False) == {}, "the weights have changed since"


FRESH = """
import json, sys
import datasets, numpy, torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from mfac_hf import load_sparse

repository, data = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(repository).eval()
tokenizer = AutoTokenizer.from_pretrained(repository)
rows = datasets.load_dataset(data, "sst2", split="validation", cache_dir=sys.argv[2] + "-cache")
with torch.inference_mode():
    right = [model(**tokenizer(r["sentence"], return_tensors="pt")).logits.argmax().item() == r["label"] for r in rows]
weights = load_sparse(repository)
same = all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
card = ModelCard.load(repository)
print(json.dumps({"accuracy": sum(right) / len(right), "card": card.data.eval_results[0].metric_value, "same": same}))
"""


@pytest.mark.slow
def test_script_pushes_and_a_fresh_process_gets_the_accuracy_of_the_card(tmp_path):
    """run_glue.py --push_to_hub on a sparse model, then plain from_pretrained elsewhere: equal to the last digit."""
    tokenizer = make_tokenizer(tmp_path)
    torch.manual_seed(0)
    model = prune(BertForSequenceClassification(BertConfig(**{**CONFIG, "vocab_size": len(tokenizer)})))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    data = write_glue(tmp_path / "data", "sst2")
    with running_hub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(ROOT)}

        def run(*command):
            result = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path
            )
            assert result.returncode == 0, result.stderr[-3000:]
            return result.stdout

        run(
            *(str(ROOT / "scripts" / "run_glue.py"), "--model_name_or_path", str(tmp_path / "model")),
            *("--dataset_name", data, "--task_name", "sst2", "--max_seq_length", "16", "--do_eval", "--use_cpu"),
            *("--output_dir", "run", "--cache_dir", "cache", "--report_to", "none", "--disable_tqdm", "true"),
            *(
                "--push_to_hub",
                "--hub_model_id",
                "user/run",
                "--optim_name",
                "adamw",
                "--do_train",
                "--max_steps",
                "2",
            ),
            *("--learning_rate", "0", "--save_strategy", "no"),
        )
        assert hub.repositories["user/run"].commits[-1] == "Model and card from mfac_hf"
        assert "sparse.safetensors" in hub.repositories["user/run"].branches["main"]
        text = str(card_on(hub))
        assert "| optimizer | AdamW |" in text and "generated_from_trainer" not in text
        found = json.loads(run("-c", FRESH, "user/run", data).splitlines()[-1])
    expected = json.loads((tmp_path / "run" / "results.json").read_text())["results"]["eval_accuracy"]
    assert found == {"accuracy": expected, "card": expected, "same": True}


def rows_of(text):
    """The settings that a card lists."""
    return {line.split(" | ")[0][2:] for line in text.splitlines() if line.count(" | ") == 1}


@pytest.mark.slow
def test_settings_of_an_optimizer_that_was_given_are_its_own(hub, bert, tmp_path):
    options = {"learning_rate": 0.25, "weight_decay": 0.5, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    own = torch.optim.SGD(bert.parameters(), lr=0.125, weight_decay=0.0625)
    trainer = make_trainer(bert, tmp_path, own, **options)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(own)
    attach_card(trainer)
    trainer.train()
    trainer.push_to_hub()
    rows, text = rows_of(str(card_on(hub))), str(card_on(hub))
    assert "| lr | 0.125 |" in text and "| weight_decay | 0.0625 |" in text and "0.25" not in text
    assert not rows & {"learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs"}
    trainer = make_trainer(bert, tmp_path, **options)  # its AdamW and its schedule
    attach_card(trainer)
    trainer.train()
    trainer.push_to_hub()
    text = str(card_on(hub))
    assert "| lr | 0.25 |" in text and rows_of(text) >= {"learning_rate", "lr_scheduler_type", "warmup_steps"}


@pytest.mark.slow
@pytest.mark.parametrize(("causal", "task"), [(True, "text-generation"), (False, "fill-mask")])
def test_language_models_have_a_perplexity(causal, task, hub, tmp_path):
    torch.manual_seed(0)
    small = {"vocab_size": 60, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**small)) if causal else BertForMaskedLM(BertConfig(**CONFIG))
    trainer = make_trainer(model, tmp_path)
    trainer.compute_metrics = None
    for row in trainer.eval_dataset:
        row["labels"] = row["input_ids"]
    attach_card(trainer)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.push_to_hub()
    card = card_on(hub)
    assert card.data.pipeline_tag == task and set(card.data.metrics) == {"loss", "perplexity"}
    assert f"| this model | perplexity | {math.exp(loss):.4g} | - | 5 |" in str(card)
    assert f"| this model | loss | {loss:.4g} |" in str(card) and "percent" not in str(card)
    trainer.args.label_smoothing_factor = 0.1  # then the loss is none of the text alone
    assert set(facts_of_trainer(trainer, name="x")["runs"][0]["metrics"]) == {"loss"}


def test_an_evaluation_that_gave_no_number_is_said(hub, bert, tmp_path):
    trainer = make_trainer(bert, tmp_path)
    trainer.compute_metrics = lambda prediction: {"accuracy": float("nan"), "f1": 0.5}
    attach_card(trainer)
    trainer.evaluate()
    trainer.push_to_hub()  # does not end the training
    text = str(card_on(hub))
    assert "The evaluation gave no finite number for accuracy: the run diverged." in text and "nan" not in text


def test_a_directory_that_has_gone_is_no_base_model(hub, bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert.save_pretrained("outputs/base")
    model = BertForSequenceClassification.from_pretrained("outputs/base")
    shutil.rmtree("outputs")
    facts = facts_of_trainer(make_trainer(model, tmp_path), name="x")
    assert facts["base_model"] is None and facts["runs"][0]["base_model"] == "outputs/base"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.repositories["outputs/base"] = Repository(branches={"main": {"config.json": b"{}"}})
    hf_hub_download("outputs/base", "config.json", endpoint=hub.url, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(trainer_card, "try_to_load_from_cache", partial(try_to_load_from_cache, cache_dir="cache"))
    assert facts_of_trainer(make_trainer(model, tmp_path), name="x")["base_model"] == "outputs/base"


@pytest.mark.parametrize("source", ["json", "generator"])
def test_a_file_format_is_no_data_set(source, hub, bert, tmp_path):
    (tmp_path / "rows.json").write_text('{"x": 1}\n')
    if source == "json":
        rows = datasets.load_dataset("json", data_files=str(tmp_path / "rows.json"), split="train", cache_dir=tmp_path)
    else:
        rows = datasets.Dataset.from_generator(lambda: iter([{"x": 1}]), cache_dir=str(tmp_path))
    trainer = make_trainer(bert, tmp_path)
    trainer.eval_dataset = rows
    assert facts_of_trainer(trainer, name="x")["runs"][0]["dataset"] is None


def test_a_trainer_with_an_adapter_pushes_the_card_of_an_adapter(hub, bert, tmp_path):
    peft = pytest.importorskip("peft")
    bert.bert.save_pretrained(tmp_path / "base")
    bert = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = peft.get_peft_model(bert, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    trainer = make_trainer(model, tmp_path, MFAC(model.parameters(), lr=2e-3, num_grads=6))
    attach_card(trainer)
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.push_to_hub()
    push_to_hub(trainer, "user/other", api=HfApi(endpoint=hub.url, token=TOKEN))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    for name in ("user/run", "user/other"):
        files = hub.repositories[name].branches["main"]
        card = ModelCard(files["README.md"].decode())
        text = str(card)
        assert card.data.library_name == "peft" and {"lora", "m-fac"} <= set(card.data.tags)
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
        assert f"| `adapter_model.safetensors` | {len(files['adapter_model.safetensors']):,} |" in text
        assert f"adapter ({trained} weights), trained with M-FAC in Adam's metric" in text
        assert f"; {trained:,} of {total:,} parameters were trained." in text and "`classifier` in full (99)" in text
        assert f"| this model | accuracy | {100 * accuracy:.2f} |" in text
        for setting in ("optimizer | M-FAC", "metric | adam", "num_grads | 6", "lr | 0.002", "r | 2"):
            assert f"| {setting} |" in text
        assert "grad_decay" not in text and "betas" in text
        # the code of the card loads it: from here, as nothing is on the Hub
        code = text.split("```python\n")[1].split("```")[0]
        code = code.replace('"..."', repr(str(tmp_path / "base"))).replace(f'"{name}"', repr(str(tmp_path / "run")))
        scope = {}
        exec(code, scope)
        inputs = {"input_ids": torch.arange(1, 9).view(1, 8)}
        with torch.no_grad():
            assert torch.equal(scope["model"].eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_files_of_the_tokenizer_are_those_that_it_writes(hub, bert, tmp_path):
    class Own:
        """Anything that can be saved."""

        def save_pretrained(self, folder, **options):
            for name in ("own.words", "deep/own.model"):
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                (Path(folder) / name).write_text("x")

    trainer = make_trainer(bert, tmp_path)
    trainer.processing_class = Own()
    push_to_hub(trainer, "user/other", api=HfApi(endpoint=hub.url, token=TOKEN))
    files = hub.repositories["user/other"].branches["main"]
    assert {"own.words", "deep/own.model", "README.md", "model.safetensors"} <= set(files)
