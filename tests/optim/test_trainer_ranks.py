"""An unmodified Trainer on several ranks: it shares the window by itself, saves it, and resumes to the bit."""

import os
import shutil

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mfac_hf import MFAC
from mfac_hf.callbacks import MFACWindowCallback
from mfac_hf.loss_scale import correct_loss_scale
from mfac_hf.optim import placement, ranked
from tests.helpers.ranks import run_on_ranks

RANKS, STEPS, SAVED = 2, 8, 5
VARIANTS = {
    "adam": {"lr": 1e-3, "num_grads": 4, "window_dtype": torch.float64},
    "identity": {"metric": "identity", "lr": 1e-2, "num_grads": 4, "damping": 1e-2, "window_dtype": torch.float64},
}


class Unused(BertForSequenceClassification):
    """A classifier with a layer that nothing uses, and one that every third example uses: often one rank alone."""

    def __init__(self, config):
        super().__init__(config)
        self.never = torch.nn.Linear(4, 4)
        self.sometimes = torch.nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
        uses = input_ids[:, 0] % 3 == 0
        if bool(uses.any()):
            first = self.bert.embeddings.word_embeddings(input_ids[:, 0])
            output.loss = output.loss + (self.sometimes(first).square().mean(1) * uses).mean()
        return output


def make_model(plain):
    set_seed(0)
    config = BertConfig(
        vocab_size=2000,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,  # ranks draw other numbers than one process
        attention_probs_dropout_prob=0.0,
    )
    model = (BertForSequenceClassification if plain else Unused)(config).double()
    model.bert.embeddings.position_embeddings.requires_grad_(plain)
    return model


def make_data(count):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 2000, (6,), generator=generator), "labels": i % 2} for i in range(count)]


def make_trainer(directory, options, *, batch_size, count=64, callbacks=(), plain=False, **arguments):
    model = make_model(plain)
    settings = {
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 2,
        "save_steps": SAVED,
        "train_sampling_strategy": "sequential",
        "ddp_find_unused_parameters": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    arguments = TrainingArguments(output_dir=str(directory), **{**settings, **arguments})
    if arguments.fsdp:  # accelerate has FSDP2 on GPUs alone; what it does with it works on processors, too
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Trainer(
        model,
        arguments,
        train_dataset=make_data(count),
        optimizer_cls_and_kwargs=(MFAC, options),
        callbacks=[MFACWindowCallback(), *callbacks],
    )
    correct_loss_scale(trainer)
    return trainer


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def assert_same(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Stop(TrainerCallback):
    """Ends the training at a step as a power cut would: what Trainer does then does not happen."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def check_shares_and_resumes(rank, directory, expected):
    for name, options in VARIANTS.items():
        trainer = make_trainer(directory / name, options, batch_size=2)
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        assert optimizer.shares_window
        assert_same(weights(trainer), expected[name])  # one process, with the same global batch
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(RANKS)]
        dist.all_gather(sizes, torch.tensor([optimizer._window.nbytes]))
        assert max(sizes) < 0.75 * sum(sizes)

        # Cut off two steps after a checkpoint, and resumed from it.
        cut = make_trainer(directory / "cut" / name, options, batch_size=2, callbacks=[Stop(SAVED + 2)])
        with pytest.raises(KeyboardInterrupt):
            cut.train()
        checkpoint = directory / "cut" / name / f"checkpoint-{SAVED}"
        assert (checkpoint / "mfac_window" / ".metadata").is_file()
        assert not (directory / "cut" / name / "_mfac_window").exists()
        resumed = make_trainer(directory / "cut" / name, options, batch_size=2)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(trainer), strict=True))
        dist.barrier()
    # The last one is read by one process, below; and a checkpoint whose window has not moved there yet, as if Trainer
    # had been killed before it could, has it beside.
    options, folder = VARIANTS["adam"], directory / "cut" / "adam"
    if rank == 0:
        shutil.copytree(folder / f"checkpoint-{STEPS}", directory / "late" / f"checkpoint-{STEPS}")
        window = directory / "late" / f"checkpoint-{STEPS}" / "mfac_window"
        (directory / "late" / "_mfac_window").mkdir()
        window.rename(directory / "late" / "_mfac_window" / f"checkpoint-{STEPS}")
    dist.barrier()
    late = make_trainer(directory / "late", options, batch_size=2, max_steps=STEPS + 1)
    late.train(resume_from_checkpoint=str(directory / "late" / f"checkpoint-{STEPS}"))
    assert late.optimizer.optimizer._window.gram.pushed == STEPS + 1


def check_uneven_batches(directory):
    """Batches of other sizes on each rank: with a whole window on each the same weights."""
    ends = []
    for group in ("auto", None):
        options = {**VARIANTS["adam"], "process_group": group}
        trainer = make_trainer(
            directory / f"uneven-{group}", options, batch_size=4, count=27, gradient_accumulation_steps=1
        )
        trainer.train()
        assert trainer.optimizer.optimizer.shares_window == (group == "auto")
        ends.append(weights(trainer))
    assert_same(*ends)


def check_fsdp(directory):
    """FSDP2: the weights of one process, and a resume with the same bits."""
    fsdp = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"]}
    fsdp |= {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False}

    def make(name, **options):
        return make_trainer(directory / name, VARIANTS["adam"], batch_size=2, plain=True, **options)

    whole = make("fsdp", fsdp=True, fsdp_config=fsdp)
    whole.train()
    assert whole.optimizer.optimizer.shares_window and whole.accelerator.is_fsdp2
    resumed = make("fsdp", fsdp=True, fsdp_config=fsdp)
    resumed.train(resume_from_checkpoint=str(directory / "fsdp" / f"checkpoint-{SAVED}"))
    assert resumed.optimizer.optimizer._window.gram.pushed == STEPS
    ends = [[p.full_tensor() for p in trainer.model.parameters()] for trainer in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    ranks = make("replicas", save_strategy="no")
    ranks.train()
    assert_same(ends[0], weights(ranks))


def on_a_rank(rank, directory, expected):
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, not used: the group exists
    ranked.SHARE_MIN_BYTES = placement.ROW_SPARSE_MIN_NUMEL = 1
    check_shares_and_resumes(rank, directory, expected)
    check_uneven_batches(directory)
    check_fsdp(directory)


@pytest.mark.slow
def test_two_ranks(tmp_path, tables_of_any_size):
    expected = {}
    for name, options in VARIANTS.items():
        trainer = make_trainer(tmp_path / f"one-{name}", options, batch_size=4)
        trainer.train()
        expected[name] = weights(trainer)
    run_on_ranks(on_a_rank, tmp_path, tmp_path, expected, ranks=RANKS)
    # One process goes on with what two have saved.
    folder = tmp_path / "cut" / "adam" / f"checkpoint-{STEPS}"
    alone = make_trainer(tmp_path / "cut" / "adam", VARIANTS["adam"], batch_size=4, max_steps=STEPS + 2)
    alone.train(resume_from_checkpoint=str(folder))
    longer = make_trainer(tmp_path / "longer", VARIANTS["adam"], batch_size=4, max_steps=STEPS + 2)
    longer.train()
    assert alone.optimizer.optimizer._window.gram.pushed == STEPS + 2
    assert_same(weights(alone), weights(longer), 1e-8)
