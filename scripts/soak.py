"""Kill a training with gradual pruning at random, again and again: ``python scripts/soak.py --minutes 30``.

A small BERT with dropout learns under Trainer with MFAC, is pruned step by step and saves often, on one and on two
ranks, with ``save_total_limit`` 1 and 2. Its processes are killed (SIGKILL, or SIGTERM; all of them, or one whose
fellow then has to end by itself) at a random moment, while they start, train, prune or save, and started anew from the
last whole checkpoint. What must hold:

- a run that starts anew goes on from the last checkpoint that was saved to its end, or a later one;
- a rank whose fellow died ends by itself, in less than the time limit of the process group;
- a run that came to its end has the bits of one that was never killed: weights, masks, optimizer, logged losses and
  random state.

Writes what it saw as JSON (``--output``) and exits with 1 if any of this did not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import (  # noqa: E402
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mfac_hf import MFAC, MFACPruningCallback, SparsitySchedule  # noqa: E402
from mfac_hf.callbacks import MFACWindowCallback  # noqa: E402
from mfac_hf.checkpoints import WholeCheckpoints, last_whole_checkpoint  # noqa: E402
from mfac_hf.machine import describe_run  # noqa: E402
from mfac_hf.storage import read_json, write_json  # noqa: E402
from mfac_hf.tasks.toy import toy_model, toy_rows, toy_tokenizer  # noqa: E402

STEPS, SAVE_EVERY = 48, 3
SCHEDULE = SparsitySchedule(((4, 0.2), (11, 0.4), (17, 0.5), (24, 0.6), (31, 0.7), (38, 0.8)))
PHASES = ("starting", "training", "pruning", "saving", "ended")
GROUP_SECONDS = 60  # time limit of the process group
END_SECONDS = 30  # a rank whose fellow died is given up after so long


@dataclass(frozen=True)
class Scenario:
    """A run to be killed."""

    ranks: int
    limit: int
    shared: bool = False

    @property
    def name(self) -> str:
        """For the report."""
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}" + (" that share the window" if self.shared else "")
        return f"{ranks}, save_total_limit={self.limit}"


class Reporter(TrainerCallback):
    """Tells the process that kills what this one is doing, and what it has saved."""

    def __init__(self, phase: Any, saved: Any) -> None:
        self.phase, self.saved = phase, saved

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Comes after the pruning."""
        self.phase.value = PHASES.index("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Comes before the saving."""
        points = {step for step, _ in SCHEDULE.points}
        self.phase.value = PHASES.index(
            "saving" if control.should_save else "pruning" if state.global_step in points else "training"
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Comes last of all."""
        self.saved.value = state.global_step
        self.phase.value = PHASES.index("training")


def make_trainer(directory: Path, scenario: Scenario) -> tuple[Trainer, MFACPruningCallback]:
    """The run, the same each time."""
    torch.set_num_threads(1)
    shared = scenario.shared and scenario.ranks > 1
    config = toy_model(hidden_size=16, num_layers=1).config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1  # so that a random state that is lost shows
    set_seed(0)
    model = BertForSequenceClassification(config)
    tokenizer = toy_tokenizer()
    rows = toy_rows(256, 1)["train"]
    ids = tokenizer([text for text, _ in rows])["input_ids"]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(directory),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            lr_scheduler_type="cosine",
            save_steps=SAVE_EVERY,
            save_total_limit=scenario.limit,
            logging_steps=SAVE_EVERY,  # Trainer forgets the losses since the last log
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            report_to="none",
        ),
        train_dataset=[{"input_ids": row, "labels": label} for row, (_, label) in zip(ids, rows, strict=True)],
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(MFAC(model.parameters(), lr=1e-3, process_group=dist.group.WORLD if shared else None), None),
    )
    pruning = MFACPruningCallback(SCHEDULE, num_grads=8, block_size=16, recomputations=2)
    trainer.add_callback(pruning)
    trainer.add_callback(MFACWindowCallback())
    WholeCheckpoints.attach(trainer)
    return trainer, pruning


def digests_of(trainer: Trainer, pruning: MFACPruningCallback) -> dict[str, str]:
    """Fingerprints of all that a run ends with."""
    optimizer: Any = trainer.optimizer
    return {
        "weights": digest(trainer.model.state_dict()),
        "masks": digest(dict(pruning.masks or {})),
        "optimizer": digest(optimizer.optimizer.state_dict()["state"]),
        "losses": digest([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]),
        "random state": digest([torch.get_rng_state(), random.getstate()]),
    }


def digest(value: Any) -> str:
    """SHA-256 of tensors and plain values, however deep."""
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if torch.is_tensor(value):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                found.update(str(key).encode())
                take(value[key])
        elif isinstance(value, list | tuple):
            for each in value:
                take(each)
        else:
            found.update(repr(value).encode())

    take(value)
    return found.hexdigest()


def work(rank: int, scenario: Scenario, directory: Path, meeting: Path, phase: Any, saved: Any, begun: Any) -> None:
    """A rank, from the last whole checkpoint to the end; leaves a fingerprint."""
    logging.disable(logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / f"said-{rank}.log", "a", encoding="utf-8") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    if scenario.ranks > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=scenario.ranks,
            timeout=timedelta(seconds=GROUP_SECONDS),
        )  # fmt: skip
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": scenario.ranks, "LOCAL_WORLD_SIZE": scenario.ranks}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, not used: the group is there
    trainer, pruning = make_trainer(directory, scenario)
    trainer.add_callback(Reporter(phase, saved))
    checkpoint = last_whole_checkpoint(directory, ranks=scenario.ranks)
    begun.value = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    trainer.train(resume_from_checkpoint=checkpoint)
    write_json(directory / f"digests-{rank}.json", digests_of(trainer, pruning))
    phase.value = PHASES.index("ended")
    os._exit(0)  # without the shutdown of gloo's threads, which can abort


class Soak:
    """Lives of runs under random kills.

    Args:
        folder: where they are.
        seed: decides all that is random here; when a kill finds a process is left to the machine.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["__main__", "mfac_hf.pruning.trainer.callback"])  # imports take long
        self.expected: dict[int, dict[str, str]] = {}
        self.seconds: dict[int, float] = {}
        self.kills: Counter[str] = Counter()
        self.faults: list[str] = []
        self.ended_in: list[float] = []
        self.passed_over = self.attempts = self.lives = 0

    def start(self, scenario: Scenario, directory: Path) -> tuple[list[Any], list[Any]]:
        """Start the ranks; return them and what they tell: phase, last save, first step."""
        self.attempts += 1
        told = [self.context.Value("q", value, lock=False) for value in (0, 0, -1)]
        meeting = self.folder / f"meeting-{self.attempts}"
        ranks = []
        for rank in range(scenario.ranks):
            # Only the first rank tells; the others have a place of their own.
            own = told if rank == 0 else [self.context.Value("q", 0, lock=False) for _ in told]
            ranks.append(self.context.Process(target=work, args=(rank, scenario, directory, meeting, *own)))
            ranks[-1].start()
        return ranks, told

    def whole(self, ranks: int, *, shared: bool = False) -> None:
        """A run that nobody kills."""
        scenario, directory = Scenario(ranks, 1, shared), self.folder / f"whole-{ranks}"
        begun = time.perf_counter()
        processes, _ = self.start(scenario, directory)
        for process in processes:
            process.join(600)
            if process.exitcode != 0:
                raise RuntimeError(f"the run that nobody kills ended with {process.exitcode}: see {directory}")
        self.seconds[ranks] = time.perf_counter() - begun
        self.expected[ranks] = self.digests(directory, ranks)

    def digests(self, directory: Path, ranks: int) -> dict[str, str]:
        """What the ranks left."""
        return {
            f"{name} of rank {rank}": value
            for rank in range(ranks)
            for name, value in read_json(directory / f"digests-{rank}.json").items()
        }

    def other_bits(self, directory: Path, ranks: int, *, was_over: bool) -> list[str]:
        """Names of what is not as in the run that nobody killed; after the last step a start draws dropout in vain."""
        found = self.digests(directory, ranks)
        other = [name for name, value in self.expected[ranks].items() if found[name] != value]
        return [name for name in other if not (was_over and name.startswith("random state"))]

    def live(self, scenario: Scenario, until: float) -> None:
        """A run under kills, to its end; after ``until`` nobody kills it any more."""
        self.lives += 1
        directory = self.folder / f"life-{self.lives}"
        last = 0
        while True:
            before = {path.name for path in directory.glob("checkpoint-*")} if directory.exists() else set()
            processes, told = self.start(scenario, directory)
            killed = time.monotonic() < until and self.kill(scenario, processes, told)
            if not killed:
                for process in processes:
                    process.join(600)
            phase, saved, begun = (value.value for value in told)
            if begun >= 0:
                if begun < last:
                    self.faults.append(f"{scenario.name}: went on from step {begun}, and step {last} was saved")
                self.passed_over += begun < max((int(name.rpartition("-")[2]) for name in before), default=0)
            last = max(last, saved)
            if killed:
                continue
            codes = [process.exitcode for process in processes]
            if codes != [0] * scenario.ranks:
                self.faults.append(f"{scenario.name}: ended with {codes} in life {self.lives}, not killed")
            elif other := self.other_bits(directory, scenario.ranks, was_over=begun >= STEPS):
                self.faults.append(f"{scenario.name}: other bits at the end of life {self.lives}: {', '.join(other)}")
            else:
                shutil.rmtree(directory)
            for process in processes:
                process.close()
            return

    def kill(self, scenario: Scenario, processes: list[Any], told: list[Any]) -> bool:
        """Kill at a random moment; False where the run came to its end before."""
        if self.random.random() < 0.5:  # any moment
            self.wait(processes, lambda: False, self.random.uniform(0, 0.6 * self.seconds[scenario.ranks]))
        else:  # a moment of a phase that is short
            aim = PHASES.index(self.random.choice(("pruning", "saving")))
            for _ in range(self.random.randrange(1, 4)):
                self.wait(processes, lambda: told[0].value != aim, 60)
                self.wait(processes, lambda: told[0].value == aim, 60)
            time.sleep(self.random.uniform(0, 0.05))
        phase = PHASES[told[0].value]
        if phase == "ended" or not any(process.is_alive() for process in processes):
            return False
        one = scenario.ranks > 1 and self.random.random() < 0.5
        kind = signal.SIGTERM if self.random.random() < 0.25 else signal.SIGKILL
        chosen = [self.random.choice(processes)] if one else processes
        for process in chosen:
            try:
                os.kill(process.pid, kind)
            except ProcessLookupError:
                pass
        begun = time.monotonic()
        for process in processes:
            process.join(END_SECONDS)
            if process.exitcode is None:
                self.faults.append(f"{scenario.name}: a rank went on for {END_SECONDS} s after {kind.name} of another")
                process.kill()
                process.join()
        if one:
            self.ended_in.append(time.monotonic() - begun)
        self.kills[f"{scenario.name}; {kind.name} of {'one rank' if one else 'all'}; {phase}"] += 1
        return True

    @staticmethod
    def wait(processes: list[Any], done: Any, seconds: float) -> None:
        """Wait so long, or until this is so or a process has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not done() and all(process.is_alive() for process in processes):
            time.sleep(0.001)

    def report(self) -> dict[str, Any]:
        """What was seen."""

        def count(part: int) -> dict[str, int]:
            counted: Counter[str] = Counter()
            for name, number in self.kills.items():
                counted[name.split("; ")[part]] += number
            return dict(sorted(counted.items()))

        return {
            "steps": STEPS,
            "save_steps": SAVE_EVERY,
            "prunings": len(SCHEDULE.points),
            "lives": self.lives,
            "starts": self.attempts,
            "kills": sum(self.kills.values()),
            "by_scenario": count(0),
            "by_kind": count(1),
            "by_phase": count(2),
            "cut_off_checkpoints_passed_over": self.passed_over,
            "seconds_until_the_other_rank_ended": {
                "number": len(self.ended_in), "largest": max(self.ended_in, default=None),
            },
            "seconds_of_a_whole_run": self.seconds,
            "faults": self.faults,
        }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Soak, write the report, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="for how long runs are killed")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes to take turns")
    parser.add_argument("--share_window", action="store_true", help="let ranks share one window")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--output", type=Path, help="file for the report, as JSON")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        soak = Soak(Path(folder), args.seed)
        for ranks in args.ranks:
            soak.whole(ranks, shared=args.share_window)
        scenarios = [Scenario(ranks, limit, args.share_window) for limit in (1, 2) for ranks in args.ranks]
        until = time.monotonic() + 60 * args.minutes
        while time.monotonic() < until:
            soak.live(scenarios[soak.lives % len(scenarios)], until)
            report = soak.report()
            print(f"{report['lives']} lives, {report['kills']} kills, faults: {report['faults']}", flush=True)
    report |= {"minutes": (time.monotonic() - begun) / 60, "seed": args.seed}
    report |= describe_run(argv, torch.device("cpu"))
    if args.output is not None:
        write_json(args.output, report)
    return int(bool(soak.faults))


if __name__ == "__main__":
    sys.exit(main())
