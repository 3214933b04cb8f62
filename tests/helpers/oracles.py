"""M-FAC as the paper states it, in a few lines of float64 with the dense matrix, to check the optimizer against."""

import torch

from mfac_hf.fisher.reference import dense_fisher


class NaiveMFAC:
    """The same steps as `mfac_hf.MFAC` on copies of the parameters, for gradients given explicitly.

    Args:
        groups: dictionaries as for the optimizer: "params", "lr", and any of momentum, weight_decay and
            decoupled_weight_decay.
        num_grads: length of the window.
        damping: of the Fisher matrix.
        normalize: "num_grads" or "count".
        grad_decay: weight of older gradients in the preconditioned average.
        masks: {position of a parameter: bool tensor, True = keep}.
    """

    def __init__(self, groups, *, num_grads, damping, normalize="num_grads", grad_decay=0.0, masks=None):
        self.num_grads, self.damping, self.normalize, self.grad_decay = num_grads, damping, normalize, grad_decay
        self.entries, self.velocities, self.rows = [], [], []
        self.masks = masks or {}
        for group in groups:
            self.add_group(group)

    def add_group(self, group):
        """Further parameters; they had zero gradients so far."""
        for p in group["params"]:
            self.entries.append((p.detach().double().clone(), group))
            self.velocities.append(torch.zeros_like(self.entries[-1][0]))
        dim = sum(p.numel() for p, _ in self.entries)
        self.rows = [torch.cat([row, row.new_zeros(dim - len(row))]) for row in self.rows]

    @property
    def params(self):
        return [p for p, _ in self.entries]

    def step(self, grads):
        """One step with these gradients; None is a zero row, and a parameter that stays."""
        row = []
        for i, ((p, group), grad) in enumerate(zip(self.entries, grads, strict=True)):
            entry = torch.zeros_like(p)
            if grad is not None:
                entry += grad.to_dense().double() if grad.is_sparse else grad.double()
                if not group.get("decoupled_weight_decay", False):
                    entry += group.get("weight_decay", 0.0) * p
            row.append((entry * self.masks[i] if i in self.masks else entry).flatten())
        self.rows = [*self.rows, torch.cat(row)][-self.num_grads :]
        ages = torch.arange(len(self.rows), dtype=torch.float64).flip(0)
        weights = self.grad_decay**ages
        average = (weights / weights.sum()) @ torch.stack(self.rows)
        divisor = self.num_grads if self.normalize == "num_grads" else len(self.rows)
        direction = torch.linalg.solve(dense_fisher(torch.stack(self.rows), self.damping, divisor), average)
        parts = direction.split([p.numel() for p, _ in self.entries])
        for i, ((p, group), part, grad) in enumerate(zip(self.entries, parts, grads, strict=True)):
            if grad is None:
                continue
            lr, momentum = group["lr"], group.get("momentum", 0.0)
            if group.get("decoupled_weight_decay", False):
                factor = torch.full_like(p, 1 - lr * group.get("weight_decay", 0.0))
                p *= torch.where(self.masks[i], factor, 1.0) if i in self.masks else factor
            self.velocities[i] = momentum * self.velocities[i] + (1 - momentum) * part.view(p.shape)
            p -= lr * self.velocities[i]


class NaiveAdamMetric:
    """The steps of `mfac_hf.MFAC` in Adam's metric, on copies of the parameters, for gradients given explicitly.

    Float64 throughout, with the d x d matrix where it is small enough to solve with.

    Args:
        groups: dictionaries as for the optimizer: "params", "lr", "betas", "eps" and "weight_decay".
        num_grads: length of the window.
        damping: relative.
        nesterov: whether the average looks one step ahead.
        masks: {position of a parameter: bool tensor, True = keep}.
    """

    def __init__(self, groups, *, num_grads, damping, nesterov=True, masks=None):
        self.num_grads, self.damping, self.nesterov, self.masks = num_grads, damping, nesterov, masks or {}
        self.entries = [(p.detach().double().clone(), group) for group in groups for p in group["params"]]
        self.moments = [torch.zeros_like(p) for p, _ in self.entries]
        self.steps = [0] * len(self.entries)
        self.rows = []

    @property
    def params(self):
        return [p for p, _ in self.entries]

    def step(self, grads):
        """One step with these gradients; None is a zero row, and a parameter and a moment that stay."""
        row, scale = [], []
        for i, ((p, group), grad) in enumerate(zip(self.entries, grads, strict=True)):
            grad = None if grad is None else grad.to_dense().double() * self.masks.get(i, True)
            beta2 = group["betas"][1]
            if grad is not None:
                self.steps[i] += 1
                self.moments[i] = beta2 * self.moments[i] + (1 - beta2) * grad**2
            corrected = self.moments[i] / max(1 - beta2 ** self.steps[i], 1e-300)
            scale.append((corrected.sqrt() + group["eps"]).flatten())
            row.append(
                torch.zeros(p.numel(), dtype=torch.float64) if grad is None else grad.flatten() / scale[-1] ** 0.5
            )
        self.rows = [*self.rows, torch.cat(row)][-self.num_grads :]
        parts = (self._direction(torch.stack(self.rows)) / torch.cat(scale) ** 0.5).split(
            [p.numel() for p in self.params]
        )
        for i, ((p, group), part, grad) in enumerate(zip(self.entries, parts, grads, strict=True)):
            if grad is not None:
                keep = self.masks.get(i, torch.ones_like(p, dtype=torch.bool))
                p.copy_(torch.where(keep, p * (1 - group["lr"] * group["weight_decay"]), p))
                p.sub_(group["lr"] * part.view_as(p) * keep)

    def _direction(self, rows):
        beta1 = self.entries[0][1]["betas"][0]
        weights = beta1 ** torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64)
        weights = weights / weights.sum()
        if self.nesterov:
            weights = beta1 * weights
            weights[-1] += 1 - beta1
        average = weights @ rows
        shift = self.damping * rows.square().sum(dim=1).mean()
        if rows.shape[1] <= 500:
            found = torch.linalg.solve(shift * torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ rows, average)
        else:
            gram = shift * torch.eye(len(rows), dtype=torch.float64) + rows @ rows.T
            found = torch.linalg.solve(gram, weights) @ rows
        return found * average.norm() / found.norm()
