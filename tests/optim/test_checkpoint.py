"""A shared window on disk: every rank its part, resumed on as many ranks to the bit, and on others to rounding."""

import copy
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint

from mfac_hf import MFAC
from mfac_hf.optim import placement
from tests.helpers.ranks import run_on_ranks
from tests.helpers.shared_net import ADAM, DOUBLE, IDENTITY, Net, mask_of, train

RANKS = 4
VARIANTS = (
    ADAM | DOUBLE | {"masks": "given"},
    ADAM | DOUBLE | {"masks": "set"},  # of a parameter whose rows are divided by then
    IDENTITY | DOUBLE | {"momentum": 0.9},
    ADAM,
)


def build(model, options, group):
    options = {**options, "masks": mask_of(model) if options.get("masks") == "given" else None}
    return MFAC(model.parameters(), **options, process_group=group)


def resumed(model, optimizer, options, group, folder):
    """A copy of a run, which goes on from what was saved: of the state, as Trainer does, what one rank has."""
    saved = [pickle.dumps(optimizer.state_dict()) if dist.get_rank(group) == 0 else None]
    if group is not None:
        dist.broadcast_object_list(saved, group=group, group_src=0)
    again = copy.deepcopy(model)
    loaded = build(again, options, group)
    loaded.load_state_dict(pickle.loads(saved[0]))
    loaded.read_window(folder)
    return again, loaded


def check_resumes(groups, folder, options):
    """From four ranks on four, two and one, from two on two and one."""
    rank, dtype = dist.get_rank(), torch.float64 if "window_dtype" in options else torch.float32
    model = Net(dtype)
    optimizer = build(model, options, groups[4])
    train(model, optimizer, range(4))
    if options.get("masks") == "set":
        optimizer.set_masks(mask_of(model))
        assert optimizer._window.owners[model.hidden.weight].is_divided()
    train(model, optimizer, range(4, 7))  # a layer joins at step 5
    assert optimizer.write_window(folder / "four")
    ends = {}
    for ranks, group in groups.items():
        if rank >= ranks:
            continue
        again, loaded = resumed(model, optimizer, options, group, folder / "four")
        if ranks == 4:
            assert sum_over(loaded._window.nbytes, group) == sum_over(optimizer._window.nbytes, group)
        assert all(
            torch.equal(optimizer._window.gram.gram_MM, each._window.gram.gram_MM) for each in (loaded, optimizer)
        )
        train(again, loaded, range(7, 9))
        if ranks == 2:
            loaded.write_window(folder / "two")
            middle, half = copy.deepcopy(again), loaded
            if rank == 0:
                single, alone = resumed(middle, half, options, None, folder / "two")
                train(single, alone, range(9, 12))
                ends["two on one"] = single
        train(again, loaded, range(9, 12))
        ends[ranks] = again
    train(model, optimizer, range(7, 12))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for ranks, again in ends.items():
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q) if ranks == 4 else torch.allclose(p, q, rtol=tolerance, atol=tolerance)


def sum_over(number, group):
    total = torch.tensor([number])
    dist.all_reduce(total, group=group)
    return int(total)


def check_all(rank, folder):
    placement.ROW_SPARSE_MIN_NUMEL = 1
    groups = {ranks: dist.new_group(range(ranks)) for ranks in (2, 4)} | {1: None}
    for number, options in enumerate(VARIANTS):
        check_resumes(groups, folder / str(number), options)


@pytest.mark.slow
def test_ranks(tmp_path):
    run_on_ranks(check_all, tmp_path, tmp_path, ranks=RANKS)


def remove_data(folder):
    for file in folder.glob("*.distcp"):
        file.unlink()


def spoil_metadata(folder):
    (folder / ".metadata").write_bytes(b"no pickle")


def write_something_else(folder):
    shutil.rmtree(folder)
    checkpoint.save({"weight": torch.zeros(3)}, checkpoint_id=folder, no_dist=True)


def lose_metadata(folder):
    (folder / ".metadata").unlink()


@pytest.fixture
def written(tmp_path):
    """A model, its optimizer, and the folder of its window."""
    model = Net(torch.float32)
    optimizer = build(model, ADAM, None)
    train(model, optimizer, range(4))
    assert optimizer.write_window(tmp_path / "window")
    return model, optimizer, tmp_path / "window"


def refused(optimizer, folder, error, message):
    """Nothing changes then, and the optimizer goes on."""
    with pytest.raises(error, match=message):
        optimizer.read_window(folder)
    assert optimizer._window is None or optimizer._window.count == 4


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove_data, ValueError, "damaged, or a part of it is missing"),
        (spoil_metadata, ValueError, "its metadata cannot be read"),
        (write_something_else, ValueError, "a checkpoint of something else"),
        (lose_metadata, FileNotFoundError, "missing, or was not finished"),
    ],
)
def test_a_damaged_folder_is_refused(written, damage, error, message):
    _, optimizer, folder = written
    damage(folder)
    refused(optimizer, folder, error, message)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ADAM | {"num_grads": 5}, "holds 6 gradients, this optimizer 5; pass num_grads=6"),
        (IDENTITY, "is of metric='adam', this optimizer of metric='identity'"),
        (
            ADAM | {"window_dtype": torch.float64},
            "torch.bfloat16, expected torch.float64; pass the saved window_dtype",
        ),
        (ADAM | {"masks": "given"}, r"expected \(\d+,\): another model or mask"),
    ],
)
def test_a_window_of_other_options_is_refused(written, options, message):
    model, _, folder = written
    refused(build(model, options, None), folder, ValueError, message)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_window_of_another_model_or_step_is_refused(written):
    model, optimizer, folder = written
    fewer = MFAC(list(model.parameters())[:-1], **ADAM)
    refused(fewer, folder, ValueError, "is of 7 parameters, this optimizer has 6")
    with torch.no_grad():
        model.head.weight *= 1.5
    refused(optimizer, folder, ValueError, "load the weights of the same checkpoint first")
