"""Push a model to the Hub in one commit: weights, sparse file and card, or nothing.

push_to_hub("outputs/sst2-90", "user/sst2-90", card="outputs/sst2-90/card.json")
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn

from mfac_hf.hub.card import build_card
from mfac_hf.hub.facts import CardOptions, collect
from mfac_hf.hub.latency import with_latency
from mfac_hf.sparse.directory import SPARSE_FILE, dense_files, find_weights
from mfac_hf.sparse.files import save_sparse

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["PushError", "push_run", "push_to_hub"]

Source: TypeAlias = nn.Module | str | os.PathLike[str]
Card: TypeAlias = ModelCard | Mapping[str, Any] | str | os.PathLike[str]

# Files that belong to a model beside its weights; training state, predictions and pickles are never pushed.
COMPANIONS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("masks.safetensors", "results.json"),
)
# Weight files of an earlier push, which from_pretrained might find first.
_WEIGHTS = re.compile(r"^(model.*\.safetensors|model\.safetensors\.index\.json|pytorch_model.*|sparse\.safetensors)$")
# A sparse file is pushed beside the ordinary one where it is smaller than this share of it.
WORTHWHILE = 0.9


class PushError(RuntimeError):
    """The Hub refused a push, or could not be reached; the message says whether anything arrived."""


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
    ``sparse.safetensors`` where the weights are sparse, configuration, tokenizer and the card. Weight files of an
    earlier push that are not part of this one are deleted in the same commit.

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
        FileNotFoundError: the directory holds no model.
        PushError: no network, no or a wrong token, or the Hub refused. Local files are as they were.
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
        text = str(_card(card, source, repo_id, sparse_only))
        return _commit(api or HfApi(), repo_id, files, text, private, revision)


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
    with tempfile.TemporaryDirectory() as folder:
        save_sparse(model, folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        return push_to_hub(
            folder,
            repo_id,
            card=_card(card, model, repo_id, sparse_only),
            api=api or HfApi(token=args.hub_token),
            private=args.hub_private_repo if private is None else private,
            revision=args.hub_revision if revision is None else revision,
            sparse_only=sparse_only,
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


def _card(card: Card, model: Source, repo_id: str, sparse_only: bool) -> ModelCard:
    """Return the card, built if facts or results are given."""
    if isinstance(card, ModelCard):
        return card
    facts: Any = card if isinstance(card, Mapping) else json.loads(Path(card).read_text(encoding="utf-8"))
    if "runs" not in facts:
        options = CardOptions(name=repo_id.rpartition("/")[2])
        facts = with_latency(collect([facts], model=model, options=options), model)
    return build_card(facts, repo_id, sparse_only=sparse_only)


def _files(model: Source, folder: Path, sparse_only: bool) -> dict[str, Path]:
    """List the files to upload by their names in the repository; write to ``folder`` those that do not exist yet."""
    directory = folder if isinstance(model, nn.Module) else Path(model)
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
    if sparse_only or sparse.stat().st_size < WORTHWHILE * sum(path.stat().st_size for path in weights):
        weights.append(sparse)
    if len(weights) > 2 or (weights and weights[0].name != "model.safetensors" and weights[0] != sparse):
        weights.append(directory / "model.safetensors.index.json")
    companions = [directory / name for name in COMPANIONS]
    return {path.name: path for path in (*weights, *companions) if path.is_file()}


def _commit(
    api: HfApi, repo_id: str, files: Mapping[str, Path], card: str, private: bool | None, revision: str | None
) -> CommitInfo:
    """Upload files and card, and delete the weight files of an earlier push."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    operations += [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    with _explained(repo_id):
        api.whoami()  # wrong tokens and dead networks show here, before anything is made
        repo_id = _repository(api, repo_id, private, revision)
        present = set(api.list_repo_files(repo_id, revision=revision))
        operations += [CommitOperationDelete(name) for name in sorted(present - files.keys()) if _WEIGHTS.match(name)]
        return api.create_commit(repo_id, operations, commit_message="Model and card from mfac_hf", revision=revision)


def _repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Make the repository and its branch where they are missing; return the name with its namespace."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise PushError(
            f"{repo_id} exists and is public; private=True would not change that. Nothing was uploaded: make it "
            "private in its settings, or choose another name"
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Raise a PushError that says what to do for each error of the client."""
    try:
        yield
    except PushError:
        raise
    except LocalTokenNotFoundError as error:
        raise PushError(f"pushing to {repo_id} needs a token: run `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise PushError(f"HF_HUB_OFFLINE is set, so nothing was pushed to {repo_id}: unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = "the token is wrong or expired: run `hf auth login`" if status == 401 else str(error)
        if status == 403:
            reason = f"the token may not write there: {error}"
        raise PushError(
            f"the Hub refused the push to {repo_id} ({status}): {reason}. No file of the repository has changed"
        ) from error
    except (HTTPError, OSError) as error:
        raise PushError(
            f"the Hub cannot be reached ({type(error).__name__}: {error}). No file of {repo_id} has changed; try again"
        ) from error
    except (RuntimeError, ValueError) as error:  # what the client makes of a refused or malformed upload
        raise PushError(
            f"the push to {repo_id} failed: {error} ({error.__cause__ or 'no other cause'}). No file of the "
            "repository has changed"
        ) from error
