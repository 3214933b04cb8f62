"""Vision runs on two processes: they train as one does, and prune alike."""

import os

import prune_vision
import pytest
import torch
import torch.distributed as dist
from torch import nn

from mfac_hf.models import ResNetCifar, read_checkpoint
from tests.helpers.ranks import run_on_ranks
from tests.helpers.vision_runs import digits_run, small_model


def assert_ranks_agree(tensors):
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)


def trained():
    """Weights after an epoch, and the accuracy with them; without batch norm, whose batches are a process's own."""
    model = small_model()
    model[1] = nn.Identity()
    run = digits_run(model, augment=False)
    optimizer = run.accelerator.prepare(torch.optim.SGD(run.model.parameters(), lr=0.05))
    row = run.train_epoch(optimizer, 0)
    return [p.detach().clone() for p in run.bare_model.parameters()], row["loss"], run.evaluate()


def on_a_rank(rank, directory, weights, loss, accuracy):
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "ACCELERATE_USE_CPU": "true",
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, not used: the group exists
    found, found_loss, found_accuracy = trained()
    # the same batches, in halves: sums in another order
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, weights, strict=True))
    assert found_loss == pytest.approx(loss, abs=1e-5) and found_accuracy == pytest.approx(accuracy, abs=0.01)
    run = digits_run()
    assert run.accelerator.num_processes == 2
    run.reestimate_batch_norm(256)
    assert_ranks_agree(run.bare_model.buffers())

    os.chdir(directory)
    runs, build = [], prune_vision.build_run
    prune_vision.build_run = lambda args: runs.append(build(args)) or runs[-1]
    flags = "--model resnet20 --checkpoint dense.pth --nepochs 1 --sparsities .6 --optim mfac --momentum 0 --ngrads 4"
    flags += " --prun_batchsize 2 --ngrads_schedule 9 --nrecomps 1 --blocksize 16 --bn_images 128 --train_images 192"
    rows = prune_vision.main([*flags.split(), "--progress", "false"])
    if rank == 0:
        assert [row["event"] for row in rows] == ["initial", "prune", "epoch"]
        pruned = read_checkpoint("experiment/model-last.pth")
        zeros = sum(int((~keep).sum()) for keep in pruned.mask.values())
        assert zeros == round(0.6 * sum(keep.numel() for keep in pruned.mask.values()))
        assert not any(pruned.weights[name][~keep].any() for name, keep in pruned.mask.items())
    assert_ranks_agree(runs[0][0].bare_model.parameters())


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    torch.manual_seed(0)
    torch.save(ResNetCifar(20, 10, 1).state_dict(), tmp_path / "dense.pth")
    run_on_ranks(on_a_rank, tmp_path, tmp_path, *trained())
