"""Push a model to the Hub in one commit: weights, sparse file and card, or nothing.

push_to_hub("outputs/sst2-90", "user/sst2-90", card="outputs/sst2-90/card.json")
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from mfac_hf.hub.adapter import ADAPTER_FILE, adapter_directory, is_adapter
from mfac_hf.hub.card import build_card, check_facts
from mfac_hf.hub.client import PushError, commit
from mfac_hf.hub.companions import find_companions
from mfac_hf.hub.facts import CardOptions, collect, is_worthwhile
from mfac_hf.hub.latency import with_latency
from mfac_hf.sparse.directory import SPARSE_FILE, check_inside, dense_files, find_weights
from mfac_hf.sparse.files import save_sparse
from mfac_hf.storage import read_json

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["PushError", "push_run", "push_to_hub"]

Source: TypeAlias = nn.Module | str | os.PathLike[str]
Card: TypeAlias = ModelCard | Mapping[str, Any] | str | os.PathLike[str]

# Weight files of an earlier push, which from_pretrained might find first.
_WEIGHTS = re.compile(
    r"^(model.*\.safetensors|model\.safetensors\.index\.json|pytorch_model.*|sparse\.safetensors"
    r"|adapter_model\.(safetensors|bin)|adapter_config\.json)$"
)


@overload
def push_to_hub(
    model_or_directory_or_trainer: Source,
    repo_id: str,
    *,
    card: Card,
    api: HfApi | None = None,
    private: bool | None = None,
    revision: str | None = None,
    sparse_only: bool = False,
) -> CommitInfo: ...


@overload
def push_to_hub(
    model_or_directory_or_trainer: Trainer,
    repo_id: str,
    *,
    card: Card | None = None,
    api: HfApi | None = None,
    private: bool | None = None,
    revision: str | None = None,
    sparse_only: bool = False,
) -> CommitInfo | None: ...


def push_to_hub(
    model_or_directory_or_trainer: Source | Trainer,
    repo_id: str,
    *,
    card: Card | None = None,
    api: HfApi | None = None,
    private: bool | None = None,
    revision: str | None = None,
    sparse_only: bool = False,
) -> CommitInfo | None:
    """Push a model in one commit: either everything arrives or the repository stays as it was.

    The repository gets the ordinary ``model.safetensors`` (or its shards) for ``from_pretrained``, beside it
    ``sparse.safetensors`` where the weights are sparse, configuration, tokenizer, code of the model's own and the
    card, which names the files that are pushed. Of a model with an adapter (peft) the adapter alone is pushed. Weight
    files of an earlier push that are not part of this one are deleted in the same commit.

    Args:
        model_or_directory_or_trainer: a model of transformers or with ``PyTorchModelHubMixin``, or any other module;
            or a directory that ``save_pretrained`` wrote, in which nothing is changed; or a Trainer, which pushes its
            model and tokenizer, and our card from then on (`mfac_hf.attach_card`).
        repo_id: ``user/name``; made if missing.
        card: a card; or its source: the facts that `mfac_hf.hub.facts.collect` gathered, their file, or the
            ``results.json`` of a run. A Trainer that gets none makes it from what it knows.
        api: a client with another endpoint or token than the default ones (of a Trainer: its ``hub_token``).
        private: whether a new repository is private. True is refused for one that exists and is public.
        revision: branch to commit to, made if missing.
        sparse_only: leave the ordinary weights out; the card then shows how to load the small file.

    Returns:
        The commit; None on a Trainer's ranks other than the first, which do nothing.

    Raises:
        TypeError: the first argument is none of these, or ``card`` is missing.
        ValueError: ``repo_id`` is no valid name, or the card is not that of the weights, or a Trainer's weights are
            spread over ranks.
        MissingResultsError: results that the card needs are missing.
        FileNotFoundError: the directory holds no model, or lacks code that its configuration names.
        PushError: no network, no or a wrong token, or the Hub refused or took too long. Local files are as they were;
            the message says whether anything has changed on the Hub, or that this is not known.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id {repo_id!r} is no valid name: {error}") from error
    source = model_or_directory_or_trainer
    if not isinstance(source, nn.Module | str | os.PathLike):
        return _push_trainer(source, repo_id, card, api, private, revision, sparse_only)
    if card is None:
        raise TypeError("card is missing: give a card, the facts that it is made from, or a results.json")
    with tempfile.TemporaryDirectory() as folder:
        files = _files(source, Path(folder), sparse_only)
        text = str(_card(card, source, repo_id, sparse_only, files))
        return _push(files, text, repo_id, api or HfApi(), private, revision)


def _push(
    files: Mapping[str, Path], card: str, repo_id: str, api: HfApi, private: bool | None, revision: str | None
) -> CommitInfo:
    return commit(
        api,
        repo_id,
        {**files, "README.md": card.encode()},
        message="Model and card from mfac_hf",
        stale=_WEIGHTS,
        private=private,
        revision=revision,
    )


def _push_trainer(
    trainer: Any,
    repo_id: str,
    card: Card | None,
    api: HfApi | None,
    private: bool | None,
    revision: str | None,
    sparse_only: bool,
) -> CommitInfo | None:
    """Attach our card to a trainer and push its model and tokenizer; its arguments replace what is None."""
    from transformers import Trainer  # here: pushing a directory need not wait for it

    from mfac_hf.hub.trainer_card import attach_card, facts_of_trainer

    if not isinstance(trainer, Trainer):
        raise TypeError(f"cannot push a {type(trainer).__name__}; expected a model, a directory or a Trainer")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "under FSDP or DeepSpeed the weights may be spread over ranks: call trainer.save_model(directory), then "
            "push the directory"
        )
    attach_card(trainer)
    if not trainer.is_world_process_zero():
        return None
    args: Any = trainer.args
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    if card is None:
        card = facts_of_trainer(trainer, name=repo_id.rpartition("/")[2])
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as others:
        files = _files(model, Path(folder), sparse_only)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(others)  # all that it writes belongs to it
            written = [path for path in sorted(Path(others).rglob("*")) if path.is_file()]
            files |= {path.relative_to(others).as_posix(): path for path in written}
        return _push(
            files,
            str(_card(card, model, repo_id, sparse_only, files)),
            repo_id,
            api or HfApi(token=args.hub_token),
            args.hub_private_repo if private is None else private,
            args.hub_revision if revision is None else revision,
        )


def push_run(trainer: Trainer) -> None:
    """Push the output directory of a script's run, with a card made from its ``results.json``, in one commit.

    Without ``--push_to_hub``, and on other ranks than the first, this does nothing.

    Raises:
        PushError: the Hub could not be reached, or refused.
    """
    args: Any = trainer.args
    if not args.push_to_hub or not trainer.is_world_process_zero():
        return
    repo_id = str(trainer.hub_model_id)
    results = Path(args.output_dir) / "results.json"
    options = CardOptions(name=repo_id.rpartition("/")[2])
    facts = with_latency(collect([results], model=args.output_dir, options=options, strict=False), args.output_dir)
    push_to_hub(args.output_dir, repo_id, card=facts, api=HfApi(token=args.hub_token), revision=args.hub_revision)


def _card(card: Card, model: Source, repo_id: str, sparse_only: bool, files: Mapping[str, Path]) -> ModelCard:
    """Return the card, built if facts or results are given; it names the weight files that are pushed."""
    if isinstance(card, ModelCard):
        return card
    facts: Any = card if isinstance(card, Mapping) else read_json(card)
    if isinstance(facts, Mapping) and "runs" in facts:
        check_facts(facts, "the facts of the card" if isinstance(card, Mapping) else str(card))
    else:
        options = CardOptions(name=repo_id.rpartition("/")[2])
        facts = with_latency(collect([card], model=model, options=options), model)
    pushed = {name: path.stat().st_size for name, path in files.items() if _is_weights(name)}
    return build_card({**facts, "files": pushed}, repo_id, sparse_only=sparse_only)


def _is_weights(name: str) -> bool:
    return _WEIGHTS.match(name) is not None and not name.endswith(".json")


def _files(model: Source, folder: Path, sparse_only: bool) -> dict[str, Path]:
    """List the files to upload by their names in the repository; write to ``folder`` those that do not exist yet."""
    directory = folder if isinstance(model, nn.Module) else Path(model)
    if is_adapter(model):
        if sparse_only:
            raise ValueError("an adapter has no sparse file: push it without sparse_only (--sparse-only)")
        if isinstance(model, nn.Module):
            with adapter_directory(model) as written:
                shutil.copytree(written, folder, dirs_exist_ok=True)
        if not (directory / ADAPTER_FILE).is_file():
            raise FileNotFoundError(f"{directory} has no {ADAPTER_FILE}: save the adapter anew with save_pretrained")
        return {ADAPTER_FILE: check_inside(directory / ADAPTER_FILE), **find_companions(directory)}
    if isinstance(model, nn.Module):
        sparse = save_sparse(model, folder, sparse_only=sparse_only)
    elif find_weights(directory) == [directory / SPARSE_FILE]:
        if not sparse_only:
            raise FileNotFoundError(
                f"{directory} has {SPARSE_FILE} alone, which from_pretrained does not read: push it with sparse_only "
                "(--sparse-only), or add model.safetensors"
            )
        sparse = directory / SPARSE_FILE
    else:
        sparse = save_sparse(directory, folder)  # one that lies there may be older than the weights
    weights = [] if sparse_only else dense_files(directory)
    if sparse_only or is_worthwhile(sparse.stat().st_size, sum(path.stat().st_size for path in weights)):
        weights.append(sparse)
    if len(weights) > 2 or (weights and weights[0].name != "model.safetensors" and weights[0] != sparse):
        weights.append(directory / "model.safetensors.index.json")
    return {path.name: check_inside(path) for path in weights if path.is_file()} | find_companions(directory)
