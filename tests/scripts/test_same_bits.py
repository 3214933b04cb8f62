"""The comparison of fixed-seed runs notices a changed bit, a value that is missing, and a scenario that failed."""

import shutil
import subprocess
from pathlib import Path

import pytest
import same_bits
import torch

ROOT = Path(__file__).parents[2]

CHANGE = """

_solve = FullFisher.solve


def _solve_off_by_a_bit(self, x_D):
    solution_D = _solve(self, x_D)
    solution_D[0] = torch.nextafter(solution_D[0], torch.tensor(float("inf"), dtype=solution_D.dtype))
    return solution_D


FullFisher.solve = _solve_off_by_a_bit
"""


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002])),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2)),
        (torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16) + 2**-7),
        (b"abc", b"abd"),
        ("x" * 99 + "y", "x" * 100),
        (0.1 + 0.2, 0.3),
        (float("nan"), 1.0),
    ],
)
def test_digests_tell_bits_apart(value, other):
    first, second = ({"a": [1, {"b": item}]} for item in (value, other))
    assert same_bits.digests(first, "run") == same_bits.digests(first, "run")
    found = same_bits.digests(first, "run"), same_bits.digests(second, "run")
    assert found[0].keys() == {"run/a/0", "run/a/1/b"}
    assert same_bits.differences(*found) == ["run/a/1/b"]


def test_what_is_missing_or_failed_is_different(capsys):
    before, after = {"a/x": "1", "a/y": "2", "b/failed": "why"}, {"a/x": "1", "a/z": "3", "b/failed": "why"}
    assert same_bits.differences(before, after) == ["a/y", "a/z", "b/failed"]
    assert same_bits.report(before, after, "HEAD") == 1
    assert same_bits.report({"a/x": "1"}, {"a/x": "1"}, "HEAD") == 0
    assert same_bits.report({}, {}, "HEAD") == 1, "nothing was compared"
    assert "missing" in capsys.readouterr().out


def test_what_the_older_revision_could_not_run_is_no_difference(capsys):
    before, after = {"a/x": "1", "b/not run": ""}, {"a/x": "1", "b/y": "2"}
    assert same_bits.differences(before, after) == [] and same_bits.report(before, after, "HEAD") == 0
    assert "not run" in capsys.readouterr().out
    assert same_bits.differences(after, before) == ["b/not run", "b/y"], "the working tree has to run it"
    assert same_bits.differences(before, {"b/y": "2"}) == ["a/x"]


def test_the_revisions_worktree_is_gone_afterwards(tmp_path, monkeypatch):
    def git(*command):
        return subprocess.run(
            ["git", "-C", str(tmp_path / "repo"), *command], check=True, capture_output=True, text=True
        )

    (tmp_path / "repo").mkdir()
    git("init", "--quiet")
    for text in ("old", "new"):
        (tmp_path / "repo" / "file").write_text(text)
        git("add", "file")
        git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", text)
    monkeypatch.setattr(same_bits, "ROOT", tmp_path / "repo")
    with same_bits.worktree("HEAD~1", tmp_path) as old:
        assert (old / "file").read_text() == "old"
    assert not old.exists() and len(git("worktree", "list").stdout.splitlines()) == 1


@pytest.mark.slow
def test_one_changed_bit_in_the_package_is_found(tmp_path):
    """Two processes, each on a package of its own."""
    shutil.copytree(ROOT / "mfac_hf", tmp_path / "changed" / "mfac_hf")
    with (tmp_path / "changed" / "mfac_hf" / "fisher" / "full.py").open("a") as file:
        file.write(CHANGE)
    before, after = (same_bits.run(root, tmp_path, ["fisher full"]) for root in (ROOT, tmp_path / "changed"))
    assert len(before) == 4
    assert same_bits.differences(before, after) == [f"fisher full/pages of {pages}/1" for pages in ("4096", "None")]


def test_a_revision_that_is_none_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as ended:
        same_bits.main(["no-such-revision"])
    assert ended.value.code == 2
    assert "'no-such-revision' is no commit" in capsys.readouterr().err
