"""Plans of ranks beside what the optimizer holds and sends: on one rank here, on two over gloo."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mfac_hf import MFAC, memory_estimate, plan_ranks
from mfac_hf.planner import MACHINES
from tests.helpers.ranks import counted_bytes, run_on_ranks

TOUCHED = 256


class Net(nn.Module):
    """A table large enough to be stored by rows, a matrix, and a frozen one; FSDP2 cuts rows of 5 unevenly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(8192, 16)
        self.hidden = nn.Linear(16, 40)
        self.head = nn.Linear(40, 5)
        self.frozen = nn.Linear(10, 10).requires_grad_(False)

    def forward(self):
        ids = torch.arange(0, 8192, 8192 // TOUCHED)  # evenly, as a plan takes it
        return (self.head(self.hidden(self.words(ids)).tanh()) + self.frozen.bias.sum()).square().sum()


def held_bytes(model, optimizer):
    state = [s for p, s in optimizer.state.items()]
    moments = [value.nbytes for s in state for key, value in s.items() if key in ("second_moment", "moment_steps")]
    parts = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    grads = [getattr(p.grad, "to_local", lambda p=p: p.grad)() for p in model.parameters() if p.grad is not None]
    return {
        "parameters": sum(p.nbytes for p in parts),
        "gradients": sum(g.nbytes for g in grads),
        "window": optimizer._window.nbytes,
        "second_moment": sum(moments),
    }


def check_step(model, optimizer, plan, run=None):
    """A step holds and hands to collectives, to the byte, what was planned for this rank."""
    for _ in range(plan_grads := 4):
        optimizer.zero_grad()
        with counted_bytes() as others:
            (run or model)().backward()
        with counted_bytes() as own:
            optimizer.step()
    assert optimizer._window.count == plan_grads
    holding = plan.holdings[dist.get_rank() if dist.is_initialized() else 0]._asdict()
    held = held_bytes(model, optimizer)
    assert held == {name: holding[name] for name in held}
    assert own.total() == sum(each.payload for each in plan.collectives if each.by == "MFAC")
    return others


def check_ranks(rank):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for options in ({}, {"metric": "identity", "num_grads": 4}):
        asked = {"num_grads": 4, "metric": options.get("metric", "adam"), "embedding_rows": TOUCHED}
        model = Net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(None, allreduce_hook)
        optimizer = MFAC(model.parameters(), **{**options, "num_grads": 4}, process_group=dist.group.WORLD)
        plan = plan_ranks(model, ranks=2, share_window=True, **asked)
        others = check_step(model, optimizer, plan, wrapped)
        assert others.total() == plan.collectives[0].payload
        assert (plan.collectives[0].by, plan.collectives[0].operation) == ("DDP", "all_reduce")

        model = Net()
        plan = plan_ranks(model, ranks=2, shards=2, **asked)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        others = check_step(model, MFAC(model.parameters(), **{**options, "num_grads": 4}), plan)
        planned = {each.operation: each.payload for each in plan.collectives if each.by == "FSDP2"}
        gathered, scattered = (sum(n for name, n in others.items() if part in name) for part in ("gather", "scatter"))
        # FSDP2 pads 5 rows to 6.
        padding = 4 * (40 + 1)
        assert (gathered, scattered) == (planned["all_gather"] + padding, planned["reduce_scatter"] + padding)


def test_two_ranks_hold_and_send_what_is_planned(tmp_path):
    run_on_ranks(check_ranks, tmp_path, ranks=2)


@pytest.mark.parametrize("metric", ["adam", "identity"])
def test_one_rank(metric):
    model = Net()
    plan = plan_ranks(model, 4, metric=metric, embedding_rows=TOUCHED)
    check_step(model, MFAC(model.parameters(), metric=metric, num_grads=4, process_group=None), plan)
    assert plan.collectives == () and plan.sent() == plan.network_seconds() == 0 and plan.fits
    assert plan.breakdown.startswith("1 rank. A rank holds at most, in MiB:")


def test_a_number_of_parameters_takes_what_memory_estimate_says():
    plan = plan_ranks(4_400_000, 8)
    held = plan.largest
    assert held.window + held.second_moment + held.matrices == memory_estimate(4_400_000, 8).bytes
    assert held.parameters == held.gradients == 4 * 4_400_000 and held.temporary == 0
    assert plan_ranks(4_400_000, 8, machine="h100").largest.temporary == 4 * 4_400_000
    assert not plan_ranks(10**12).fits


def test_copies_of_shards_and_what_copies_send():
    model = Net()
    plain, hybrid = plan_ranks(model, ranks=2, shards=2), plan_ranks(model, ranks=6, shards=2)
    assert hybrid.holdings == plain.holdings * 3 and not hybrid.shares_window
    assert [c.ranks for c in hybrid.collectives] == [2, 2, 3, 6, 6]
    assert "6 ranks, FSDP2: 2 shards x 3 copies" in hybrid.breakdown
    assert hybrid.network_seconds("FSDP2") > plain.network_seconds("FSDP2") > 0


def test_small_windows_are_not_shared_unless_asked():
    for numel, asked, shares in ((1000, None, False), (1000, True, True), (10**7, None, True), (10**7, False, False)):
        plan = plan_ranks(numel, ranks=4, share_window=asked)
        assert plan.shares_window == shares
        assert (plan.sent() > 0) == shares and plan.sent("DDP") == 6 * numel
        assert plan.largest.window == 8 * 2 * (numel // 4 if shares else numel)


def test_a_faster_machine_takes_less_time():
    slow = plan_ranks(10**7, ranks=4, machine=MACHINES["laptop"])
    fast = plan_ranks(10**7, ranks=4, machine="h100")
    assert fast.compute_seconds < slow.compute_seconds and fast.network_seconds() < slow.network_seconds()
    assert slow.step_seconds == slow.compute_seconds + slow.network_seconds()
    assert "assumed of a rank: 2800 GB/s of memory, 370 GB/s of network each way, 10 us a message" in fast.breakdown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "ranks is 0; expected at least 1"),
        ({"shards": 0}, "shards is 0; expected at least 1"),
        ({"ranks": 6, "shards": 4}, "6 ranks with parameters in 4 shards; expected a multiple of 4 ranks"),
        ({"ranks": 2, "shards": 2, "share_window": False}, "share_window is False with 2 shards; leave it out"),
        ({"embedding_rows": -1}, "embedding_rows is -1"),
        ({"num_grads": 0}, "num_grads is 0"),
        ({"metric": "newton"}, "metric is 'newton'"),
        ({"machine": "abacus"}, "machine is 'abacus'; expected one of laptop, h100"),
        ({"machine": MACHINES["laptop"]._replace(latency=-1.0)}, "latency of the machine is -1.0"),
        ({"model_or_numel": 0}, "0 parameters to optimize"),
        ({"model_or_numel": nn.Linear(2, 2).requires_grad_(False)}, "0 parameters to optimize"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_ranks(**{"model_or_numel": 1000, **options})
