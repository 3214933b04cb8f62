"""The plain steps of study_window.py."""

import pytest
import study_window
import torch
from torch import nn

from mfac_hf import MFAC


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nesterov, damping 1", {}),
        ("nesterov", {"damping": 0.3}),
        ("average", {"nesterov": False, "damping": 0.3}),
        ("16 gradients, damping 1", {"num_grads": 16}),
    ],
)
def test_what_mfac_can_do_is_what_mfac_does(name, options):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(60)) for _ in range(2))
    optimizer = MFAC([ours], lr=1e-3, window_dtype=torch.float32, **options)
    plain = study_window.PlainStep(60, study_window.VARIANTS[name], steps=30)
    for step in range(30):
        ours.grad = torch.randn(60) + 10.0 ** (step % 3 - 1)
        optimizer.step()
        with torch.no_grad():
            theirs.mul_(1 - 1e-3 * study_window.WEIGHT_DECAY).sub_(1e-3 * plain.direction(ours.grad))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_every_second_gradient_stays_and_the_newest_takes_part():
    plain = study_window.PlainStep(5, study_window.VARIANTS["every second gradient"], steps=30)
    for _ in range(20):
        plain.direction(torch.randn(5))
    assert [step for step, _ in plain.rows] == [7, 9, 11, 13, 15, 17, 19, 20]


def test_eight_bits_round_to_a_part_of_the_largest_of_each_block():
    row = torch.cat([torch.linspace(-1, 1, 256), torch.linspace(-1e-3, 1e-3, 100)])
    rounded = study_window._rounded(row, 8)
    assert (rounded - row)[:256].abs().max() <= 0.5 / 127 + 1e-6
    assert 0 < (rounded - row)[256:].abs().max() <= 0.5e-3 / 127 + 1e-9


@pytest.mark.slow
def test_every_variant_is_run_once(tmp_path):
    argv = ["--seeds", "1", "--steps", "3", "--batch_size", "4", "--output", str(tmp_path)]
    rows = study_window.main(argv)
    assert [row["key"]["variant"] for row in rows] == list(study_window.VARIANTS)
    assert all(0.3 < row["mean_loss"] < 1.5 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert study_window.main(argv) == rows
    assert len((tmp_path / "window-variants.jsonl").read_text().splitlines()) == len(rows)
    assert "| adamw | 1 |" in (tmp_path / "window-variants.md").read_text()
