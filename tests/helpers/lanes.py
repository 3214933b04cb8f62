"""A device that computes and transfers on the processor, in any order that waits allow."""

import random

import torch


class Mark:
    """Stands for what a queue was asked for before it."""

    done = False


class DisorderedLane:
    """Two queues, of transfers and of computing, whose heads are carried out as late as possible or at random.

    Args:
        order: ``"late"``: nothing is done before it is waited for; ``"transfers"`` and ``"computing"``: this queue as
            soon as it can, the other late; or a number, by which chance decides.
        ignores: names of methods that do nothing, to see that each of them is needed.
    """

    def __init__(self, order, ignores=()):
        self.order, self.ignores = order, ignores
        self.queues = {"transfers": [], "computing": []}
        self.chance = random.Random(order) if isinstance(order, int) else None
        self.most_waiting = 0

    def pinned(self, shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)

    on_device = pinned

    def transfer(self, target, source):
        self._ask("transfers", lambda: target.copy_(source))

    def compute(self, run):
        self._ask("computing", run)

    def transferred(self):
        return self._mark("transfers")

    def computed(self):
        return self._mark("computing")

    def transfer_after(self, mark):
        if "transfer_after" not in self.ignores:
            self._ask("transfers", mark)

    def compute_after(self, mark):
        if "compute_after" not in self.ignores:
            self._ask("computing", mark)

    def wait(self, mark):
        while not mark.done and "wait" not in self.ignores:
            self._advance()

    def settle(self):
        mark = self.computed()
        while not mark.done:
            self._advance()

    def _mark(self, name):
        mark = Mark()
        self._ask(name, lambda: setattr(mark, "done", True))
        return mark

    def _ask(self, name, what):
        self.queues[name].append(what)
        self.most_waiting = max(self.most_waiting, len(self.queues["transfers"]))
        if self.chance is not None:
            for _ in range(self.chance.randrange(4)):
                self._advance(may=True)
        elif self.order in self.queues:
            while self._step(self.order):
                pass

    def _advance(self, may=False):
        """Carry out one thing, of either queue if chance decides; something can always be done."""
        names = list(self.queues)
        if self.chance is not None:
            self.chance.shuffle(names)
        elif self.order == "computing":
            names.reverse()
        assert any(self._step(name) for name in names) or may, "both queues wait for each other"

    def _step(self, name):
        queue = self.queues[name]
        if not queue or (isinstance(queue[0], Mark) and not queue[0].done):
            return False
        head = queue.pop(0)
        if not isinstance(head, Mark):
            head()
        return True
