"""A Hub that is slow, silent or odd, or whose answers are lost: errors say what has become of the repository."""

import json
import re
from functools import partialmethod

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session
from torch import nn

from mfac_hf import push_to_hub
from mfac_hf.hub import client
from mfac_hf.hub.inventory import find_model_directory
from mfac_hf.hub.push import PushError
from tests.helpers.hub_server import TOKEN, running_hub

CARD = {"README.md": b"---\nlicense: mit\n---\n# x\n"}
STALE = re.compile(r"old.*")


@pytest.fixture
def hub(monkeypatch):
    """A running Hub, and limits that a test can wait for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(client, "HUB_SECONDS", 0.5)
    monkeypatch.setattr(client, "LOOK_SECONDS", 0.5)
    with running_hub() as server:
        yield server


@pytest.fixture
def push(hub):
    """Push some files to user/m."""
    api = HfApi(endpoint=hub.url, token=TOKEN)

    def call(files=None, revision=None):
        options = {"message": "A commit", "stale": STALE, "private": None, "revision": revision}
        return client.commit(api, "user/m", {**CARD, **(files or {"a.txt": b"a"})}, **options)

    return call


def broken(hub, push):
    """What a push says that fails."""
    with pytest.raises(PushError) as error:
        push()
    return " ".join(str(error.value).split())


@pytest.mark.parametrize("revision", [None, "v1"])
@pytest.mark.parametrize("large", [(), (".txt",)], ids=["regular", "lfs"])
def test_a_commit_whose_answer_was_lost_is_found_on_its_branch(hub, push, large, revision, tmp_path):
    hub.lfs_suffixes = large
    push({"old.txt": b"old"}, revision)
    (tmp_path / "b").write_bytes(b"of a file")
    hub.lost = {"/commit/"}
    found = push({"a.txt": b"a", "b.txt": tmp_path / "b"}, revision)
    branch = revision or "main"
    assert set(hub.repositories["user/m"].branches[branch]) == {"README.md", "a.txt", "b.txt"}
    assert found.oid == hub.repositories["user/m"].sha(branch) and found.commit_url.endswith(f"/commit/{found.oid}")


@pytest.mark.parametrize(
    "answer",
    [
        (502, {}, b"Bad gateway"),
        (504, {"Retry-After": "3600"}, b""),
        (200, {}, b"<html>log in first</html>"),
        (200, {}, b"{}"),
        (200, {}, b"[1]"),
        (200, {}, json.dumps({"commitUrl": 1, "commitOid": None}).encode()),
    ],
)
def test_a_commit_that_arrived_counts_whatever_was_answered(hub, push, answer):
    hub.answers = {"/commit/": answer}
    assert push().oid == hub.repositories["user/m"].sha("main")


def test_a_commit_that_cannot_be_looked_for_is_called_unknown(hub, push):
    push()
    hub.before = lambda path: hub.lost.add("/api/") if "/commit/" in path else None
    said = broken(hub, lambda: push({"a.txt": b"b"}))
    assert "It is not known whether the commit to user/m arrived" in said and "has changed" not in said
    assert f"{hub.url}/user/m/commits/main" in said
    assert hub.repositories["user/m"].branches["main"]["a.txt"] == b"b"


def test_a_commit_that_did_not_arrive_may_still_come(hub, push):
    hub.silent = {"/commit/"}
    said = broken(hub, push)
    assert "had not moved" in said and "still be at work" in said and "has changed" not in said


def test_a_commit_of_somebody_else_is_not_ours(hub, push):
    push()
    hub.silent = {"/commit/"}

    def another_push(path):
        if "/commit/" in path:
            hub.repositories["user/m"].branches["main"]["theirs.txt"] = b"theirs"

    hub.before = another_push
    assert "has moved meanwhile, to a commit with other files" in broken(hub, lambda: push({"a.txt": b"b"}))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["/whoami", "/create", "/tree/", "/preupload/", "/validate-yaml", "/lfs/objects"])
def test_a_silent_hub_is_given_up(hub, push, part):
    hub.silent, hub.lfs_suffixes = {part}, (".txt",)
    assert "No file of" in broken(hub, push)
    assert hub.repositories.get("user/m") is None or hub.repositories["user/m"].branches["main"] == {}


@pytest.mark.parametrize("part", ["/whoami", "/tree/", "/preupload/", "/lfs/objects"])
def test_a_long_wait_is_refused_with_its_length(hub, push, part):
    hub.lfs_suffixes = (".txt",)
    for status, headers in ((503, {"Retry-After": "86400"}), (429, {"ratelimit": '"api";r=0;t=86400'})):
        hub.answers = {part: (status, headers, b"")}
        said = broken(hub, push)
        assert f"answers {status} and asks to wait for 86400 s" in said and "No file of the repository" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [b"<html>", b"", b"[]", b"{}", b"null", b'"x"', b"\xff", b'{"name": 3, "url": []}']
)
@pytest.mark.parametrize("part", ["/create", "/api/models/user/m", "/tree/", "/preupload/", "/validate-yaml"])
def test_odd_answers_are_errors_with_words(hub, push, part, content):
    push()
    before = dict(hub.repositories["user/m"].branches["main"])
    hub.answers = {part: (200, {"Content-Type": "text/html"}, content)}
    try:
        push({"a.txt": b"b"})
    except PushError as error:
        assert "user/m" in str(error) and "No file of" in str(error)
        assert hub.repositories["user/m"].branches["main"] == before
    else:  # an answer that nothing depends on
        assert hub.repositories["user/m"].branches["main"]["a.txt"] == b"b"


@pytest.mark.parametrize("status", [301, 307])
def test_redirects_in_a_circle_end(hub, push, status):
    hub.answers = {"/whoami": (status, {"Location": "/api/whoami-v2"}, b"")}
    assert "cannot be reached (TooManyRedirects" in broken(hub, push)


def test_a_repository_of_another_name_gets_nothing(hub, push):
    hub.answers = {"/create": (200, {}, json.dumps({"url": f"{hub.url}/other/thing"}).encode())}
    assert "made other/thing when it was asked for user/m" in broken(hub, push)


def test_limits_end_with_the_block(hub):
    hooks = {event: list(found) for event, found in get_session().event_hooks.items()}
    with client.limited_calls(), client.limited_calls(1.0):
        assert get_session().event_hooks != hooks
    assert {event: list(found) for event, found in get_session().event_hooks.items()} == hooks


def test_push_to_hub_returns_the_commit_that_it_found(hub):
    hub.lost = {"/commit/"}
    card = ModelCard(CARD["README.md"].decode())
    commit = push_to_hub(nn.Linear(4, 4), "user/m", card=card, api=HfApi(endpoint=hub.url, token=TOKEN))
    assert commit.oid == hub.repositories["user/m"].sha("main")


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'[{"path": 1}]', b"{}", b"[3]", b"null"])
def test_reading_a_repository_takes_no_odd_answer_for_a_list(hub, push, content, monkeypatch):
    push()
    monkeypatch.setattr(HfApi, "__init__", partialmethod(HfApi.__init__, endpoint=hub.url))
    hub.answers = {"/tree/": (200, {}, content)}
    with pytest.raises(OSError, match="unexpected form|holds no safetensors"):
        find_model_directory("user/m")


def test_reading_a_silent_repository_ends(hub, push, monkeypatch):
    push()
    monkeypatch.setattr(HfApi, "__init__", partialmethod(HfApi.__init__, endpoint=hub.url))
    hub.silent = {"/tree/"}
    with pytest.raises((OSError, HTTPError)):
        find_model_directory("user/m")
