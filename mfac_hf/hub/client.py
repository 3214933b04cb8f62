"""One commit to the Hub: all of it or nothing, within limits of time, and with words for whatever goes wrong."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import get_session

__all__ = ["HubDelayError", "PushError", "asking_the_hub", "commit", "limited_calls"]

# A call fails when the Hub is silent for so long, and is not repeated when it began longer ago. The Hub itself gives
# up on a commit after a minute.
HUB_SECONDS = 60.0
LOOK_SECONDS = 15.0  # for the look after a commit whose answer was lost
MAX_RETRY_AFTER = 60  # the longest wait in seconds that the Hub may ask for
# What the client makes of an answer that is no JSON, or JSON of another form.
_MISREAD = (ValueError, LookupError, TypeError, AttributeError)

Content = Path | bytes


class PushError(RuntimeError):
    """The Hub refused a push, or could not be reached; the message says whether anything arrived."""


class HubDelayError(OSError):
    """The Hub took too long, or asks to wait for too long."""


class _Limits:
    """Limits of time on the calls of the client, whose hooks see each request and each answer.

    Args:
        seconds: the longest silence.

    Attributes:
        committing: whether a commit was sent.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.committing = False
        self._began: dict[str, float] = {}  # of calls that have not succeeded yet

    def before(self, request: Any) -> None:
        """Limit a request, and refuse to repeat one that has failed for too long."""
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), self.seconds)
        call = f"{request.method} {request.url}"
        began = self._began.setdefault(call, time.monotonic())
        # The upload of a large file takes its time; each try is limited by itself.
        if request.method != "PUT" and time.monotonic() - began > self.seconds:
            raise HubDelayError(f"the Hub has refused or not answered {call} for {self.seconds:.0f} s")
        self.committing |= request.method == "POST" and "/commit/" in request.url.path

    def after(self, response: Any) -> None:
        """Note a success, and refuse a wait that is too long."""
        if response.status_code < 400:
            self._began.pop(f"{response.request.method} {response.request.url}", None)
            return
        waits = [response.headers.get("retry-after", "").strip()]
        waits += re.findall(r"\bt\s*=\s*(\d+)", response.headers.get("ratelimit", ""))
        longest = max((int(wait) for wait in waits if re.fullmatch("[0-9]{1,18}", wait)), default=0)
        if longest > MAX_RETRY_AFTER:
            raise HubDelayError(f"the Hub answers {response.status_code} and asks to wait for {longest} s")


@contextmanager
def limited_calls(seconds: float | None = None) -> Iterator[_Limits]:
    """Limit the time of each call of the client within a block.

    Args:
        seconds: the longest silence, `HUB_SECONDS` if None.

    Raises:
        HubDelayError: the Hub keeps failing for longer than that, or asks for a longer wait than `MAX_RETRY_AFTER`.
    """
    limits, client = _Limits(HUB_SECONDS if seconds is None else seconds), get_session()
    before = {event: list(hooks) for event, hooks in client.event_hooks.items()}
    client.event_hooks = {
        "request": [*before.get("request", []), limits.before],
        "response": [*before.get("response", []), limits.after],
    }
    try:
        yield limits
    finally:
        client.event_hooks = before


@contextmanager
def asking_the_hub(name: str) -> Iterator[None]:
    """Limit the time of each call of the client within a block, and say so where an answer makes no sense.

    Args:
        name: name of the repository that is read.

    Raises:
        HubDelayError: as `limited_calls`.
        OSError: an answer of another form than the Hub's.
    """
    try:
        with limited_calls():
            yield
    except (OSError, HFValidationError):
        raise
    except _MISREAD as error:
        raise OSError(
            f"the Hub answered what was asked of {name} in an unexpected form: {_first_line(error)}"
        ) from error


def commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Content],
    *,
    message: str,
    stale: re.Pattern[str],
    private: bool | None,
    revision: str | None,
) -> CommitInfo:
    """Upload files in one commit, which also deletes what an earlier push left.

    Where the answer to the commit is lost, the repository tells whether it arrived.

    Args:
        api: the client.
        repo_id: the repository; made if missing.
        files: paths or contents by name.
        message: title of the commit.
        stale: names of the files to delete where they are not among ``files``.
        private: whether a new repository is private. True is refused for one that exists and is public.
        revision: branch to commit to, made if missing.

    Raises:
        PushError: no network, no or a wrong token, or the Hub refused; the message says whether anything arrived.
    """
    with _explained(repo_id), limited_calls():
        api.whoami()  # wrong tokens and dead networks show here, before anything is made
        repo_id = _repository(api, repo_id, private, revision)
        head = api.model_info(repo_id, revision=revision).sha
        present = set(api.list_repo_files(repo_id, revision=revision))
    change = _Change(api, repo_id, revision, files, [n for n in sorted(present - files.keys()) if stale.match(n)])
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    operations += [CommitOperationDelete(name) for name in change.deleted]
    with _explained(repo_id) as explanation, limited_calls() as limits:
        try:
            return api.create_commit(repo_id, operations, commit_message=message, revision=revision)
        except Exception as error:
            if not limits.committing or _status(error) in range(400, 500):
                raise
            found, explanation.outcome = change.look(head)
            if found is None:
                raise
            url = f"{api.endpoint}/{repo_id}/commit/{found}"
            return FoundCommit(commit_url=url, commit_message=message, commit_description="", oid=found)


class FoundCommit(CommitInfo):
    """A commit to a model's branch whose answer was lost, under whatever address its Hub has."""

    def __post_init__(self) -> None:
        """Read the endpoint off the commit's address; `CommitInfo` expects the default one."""
        repository = self.commit_url.partition("/commit/")[0]
        self.repo_url = RepoUrl(repository, endpoint=repository.rsplit("/", 2)[0])
        self.pr_revision, self.pr_num = None, None


def _repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Make the repository and its branch where they are missing; return the name with its namespace."""
    made = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if made.casefold() != repo_id.casefold() and made.rpartition("/")[2].casefold() != repo_id.casefold():
        raise PushError(f"the Hub made {made} when it was asked for {repo_id}; nothing was uploaded")
    if private and not api.model_info(made).private:
        raise PushError(
            f"{made} exists and is public; private=True would not change that. Nothing was uploaded: make it "
            "private in its settings, or choose another name"
        )
    if revision is not None:
        api.create_branch(made, branch=revision, exist_ok=True)
    return made


@dataclass
class _Change:
    """A commit that may have arrived: what it adds and deletes."""

    api: HfApi
    repo_id: str
    revision: str | None
    files: Mapping[str, Content]
    deleted: Sequence[str]

    def look(self, before: str | None) -> tuple[str | None, str]:
        """Look at the branch after the answer to the commit was lost.

        Args:
            before: the branch's head before the commit.

        Returns:
            The head, if the commit has arrived there, else None; and what to say of the repository.
        """
        branch = self.revision or "main"
        where = f"look at {self.api.endpoint}/{self.repo_id}/commits/{branch} before you push again"
        try:
            with limited_calls(LOOK_SECONDS):
                head = self.api.model_info(self.repo_id, revision=self.revision).sha
                if head is not None and head != before and self._is_there(head):
                    return head, ""
        except Exception as error:  # a second failure, of whatever kind, adds nothing to the first
            return (
                None,
                f"It is not known whether the commit to {self.repo_id} arrived ({_first_line(error)}): {where}",
            )
        if head == before:
            return None, f"Branch {branch} had not moved a moment later, but the Hub may still be at work: {where}"
        return None, f"Branch {branch} has moved meanwhile, to a commit with other files ({head}): {where}"

    def _is_there(self, head: str) -> bool:
        """Whether a commit has exactly the files that were sent."""
        tree = list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=head))
        there = {entry.path: (getattr(entry, "blob_id", None), getattr(entry, "lfs", None)) for entry in tree}
        for name, content in self.files.items():
            blob, lfs = there.get(name, (None, None))
            ours, theirs = _hashes(content), blob if lfs is None else lfs.sha256
            if theirs not in ours:
                return False
        return not any(name in there for name in self.deleted)


def _hashes(content: Content) -> tuple[str, str]:
    """Return the SHA-1 under which git keeps a file, and the SHA-256 under which large ones are kept."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    git, large = hashlib.sha1(b"blob %d\0" % size), hashlib.sha256()
    for part in _parts(content):
        git.update(part)
        large.update(part)
    return git.hexdigest(), large.hexdigest()


def _parts(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with open(content, "rb") as file:
        while part := file.read(1 << 20):
            yield part


def _status(error: BaseException) -> int | None:
    """Return the status that the Hub answered with, if it did."""
    for one in (error, error.__cause__):
        if isinstance(one, HfHubHTTPError) and one.response is not None:
            return one.response.status_code
    return None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@dataclass
class _Explanation:
    """What an error of a block says of the repository; its default is true until a commit is sent."""

    outcome: str = "No file of the repository has changed"


@contextmanager
def _explained(repo_id: str) -> Iterator[_Explanation]:
    """Raise a PushError that says what to do for each error of the client, and what has become of the repository."""
    explanation = _Explanation()
    try:
        yield explanation
    except PushError:
        raise
    except LocalTokenNotFoundError as error:
        raise PushError(f"pushing to {repo_id} needs a token: run `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise PushError(f"HF_HUB_OFFLINE is set, so nothing was pushed to {repo_id}: unset it") from error
    except HubDelayError as error:
        raise PushError(
            f"{error}: the push to {repo_id} was given up. {explanation.outcome}; try again later"
        ) from error
    except HfHubHTTPError as error:
        status = _status(error)
        reason = "the token is wrong or expired: run `hf auth login`" if status == 401 else str(error)
        if status == 403:
            reason = f"the token may not write there: {error}"
        raise PushError(
            f"the Hub refused the push to {repo_id} ({status}): {reason}. {explanation.outcome}"
        ) from error
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise PushError(f"{error.filename} cannot be read: {error.strerror}. {explanation.outcome}") from error
        raise PushError(
            f"the Hub cannot be reached ({type(error).__name__}: {error}). "
            f"{explanation.outcome.replace('the repository', repo_id)}; try again"
        ) from error
    except (RuntimeError, *_MISREAD) as error:  # what the client makes of a refused upload, or of an odd answer
        cause = "" if error.__cause__ is None else f" ({error.__cause__})"
        raise PushError(
            f"the push to {repo_id} failed, since the Hub refused it or answered in an unexpected form: "
            f"{_first_line(error)}{cause}. {explanation.outcome}"
        ) from error
