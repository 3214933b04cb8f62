"""Runs a function on several processes that talk over gloo on the loopback interface."""

import contextlib
import gc
import multiprocessing
import os
import socket
import sys
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Everything that ranks import, which takes longer than most tests: one process imports it and is forked for each rank.
# The first start of that process decides, so the list is the same for all.
IMPORTED = [
    "accelerate",
    "mfac_hf.optim.mfac",
    "mfac_hf.pruning.trainer.callback",
    "torch.distributed.checkpoint",
    "transformers.trainer",
]


def forked():
    """A context whose processes are forked from one that has imported everything."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")


def run_on_ranks(function, directory, *args, ranks=2):
    """Call ``function(rank, *args)`` on each rank; a failure on any of them is raised here with its traceback."""
    forked()
    arguments = (function, f"file://{directory / 'rendezvous'}", ranks, args, dict(os.environ))
    mp.start_processes(_run, arguments, nprocs=ranks, start_method="forkserver")


def _run(rank, function, rendezvous, ranks, args, environment):
    os.environ.update(environment)  # that of the process that is forked is older
    torch.set_num_threads(1)
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        function(rank, *args)
    finally:
        # Optimizers lie in reference cycles and hold the group. One that outlives the interpreter has threads that
        # drop their last tensors during its shutdown, which was seen to abort the process.
        gc.collect()
        dist.destroy_process_group()
    # A thread of gloo that still runs when the interpreter shuts down aborts the process, which has done its work:
    # seen once in some hundred runs. So it leaves without a shutdown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


COLLECTIVES = ("broadcast", "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
COLLECTIVES += ("all_gather_single", "reduce_scatter_single")  # what they are called from torch 2.13 on


@contextlib.contextmanager
def counted_bytes():
    """Bytes handed to collectives in a block; of the whole tensor, where ranks have parts of it."""
    counts = Counter()
    plain = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counting(name):
        def call(*arguments, **options):
            counts[name] += max(x.nbytes for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor))
            return plain[name](*arguments, **options)

        return call

    for name in plain:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
