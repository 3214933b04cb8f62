r"""The M-FAC optimizer: preconditioning by the inverse of a sliding-window empirical Fisher.

Each step stores the new gradient g in a window of the last m. In the identity metric, the paper's, it moves the
parameters along

.. math:: v \leftarrow \mu v + (1 - \mu) F^{-1} g, \qquad \theta \leftarrow \theta - \eta v, \qquad
          F = \lambda I + \tfrac{1}{n} \sum_{i=1}^{m} g_i g_i^\top

(`mfac_hf.fisher.window` has the algebra.) While :math:`n\lambda` is small against the part of g that is orthogonal to
the other stored gradients, :math:`g_\perp`, the direction is about :math:`n g_\perp / |g_\perp|^2`: it grows with the
window and shrinks with the gradient. Tune ``lr * num_grads``, not ``lr``.

In Adam's metric, the default, the window holds :math:`\tilde g = D^{-1/2} g` with AdamW's denominators
:math:`D = \mathrm{diag}(\sqrt{\hat v} + \epsilon)` (`mfac_hf.optim.metric`), and a step is

.. math:: \theta \leftarrow (1 - \eta\delta)\theta - \eta D^{-1/2} \tilde G^\top c, \qquad
          c \propto (s I + \tilde G \tilde G^\top)^{-1} w, \qquad
          w_i = \frac{\beta_1^{age(i) + 1}}{\sum_j \beta_1^{age(j)}} + (1 - \beta_1) [age(i) = 0],

with s = :math:`\rho` times the mean squared length of the stored gradients, as long as :math:`\tilde G^\top w`
(`mfac_hf.fisher.gram`). A large :math:`\rho` gives about NAdam with decoupled weight decay, or AdamW where
``nesterov=False`` leaves the weights at :math:`\beta_1^{age}`; a small one takes curvature out of the window.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.defaults import MFAC_METRIC
from mfac_hf.fisher.options import MAX_NORM
from mfac_hf.machine import GIB
from mfac_hf.optim.accumulation import BatchCount
from mfac_hf.optim.autocast import without_autocast
from mfac_hf.optim.gradients import are_finite, read_gradients
from mfac_hf.optim.groups import check_group, check_parameters, check_process_group, remove_window_options
from mfac_hf.optim.masks import check_masks, check_only_shrink
from mfac_hf.optim.metric import next_scalings
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.ranked import RankedOptimizer
from mfac_hf.optim.settings import BY_METRIC, settings_of, warn_of_old_habits
from mfac_hf.optim.update import apply_directions, plan_moves

__all__ = ["MFAC"]


class MFAC(RankedOptimizer):
    r"""Matrix-free approximate natural-gradient descent with the dynamic algorithm of M-FAC.

    Usage with the Hugging Face Trainer: ``Trainer(..., optimizers=(MFAC(model.parameters(), lr=5e-5), None))``. The
    learning rate is this optimizer's own (``TrainingArguments.learning_rate`` is not used), and Trainer adds its
    schedule to it. Trainer clips gradients to ``max_grad_norm`` (1.0) before they enter the window, as in the
    published runs.

    Memory: m * d numbers of ``window_dtype`` for dense parameters, allocated at the first step; embeddings are stored
    exactly by the rows that each batch touched. In Adam's metric a second moment of every parameter, in float32. See
    `mfac_hf.memory_estimate`.

    Args:
        params: parameters, named parameters or parameter groups. Groups may have their own lr and weight_decay, in
            Adam's metric eps and second beta, in the identity metric momentum and decoupled_weight_decay; all groups
            have the other options in common. Between steps, these and, in all groups alike, damping and grad_decay may
            be changed in ``param_groups``; the others are fixed.
        lr: learning rate, >= 0: AdamW's, in Adam's metric.
        metric: ``"adam"``, or ``"identity"``, the paper's. Each has its own defaults (`mfac_hf.defaults`), and options
            that the other does not have: betas, eps and nesterov belong to Adam's; momentum, decoupled_weight_decay,
            normalize and grad_decay to the identity.
        num_grads: gradients in the window, m >= 1; by default 8, in the identity metric 1024.
        damping: :math:`\rho > 0`, which has no unit; in the identity metric :math:`\lambda > 0`.
        betas: :math:`\beta_1`, the decay of the stored gradients' weights, and :math:`\beta_2`, that of the second
            moment, which groups may have of their own.
        eps: :math:`\epsilon > 0`.
        nesterov: let the average of the stored gradients look one step ahead, as NAdam does: the second term of w.
        momentum: :math:`\mu` in [0, 1), decay of the exponential average v of the *directions*.
        weight_decay: coefficient >= 0, in Adam's metric decoupled, as in AdamW. In the identity metric that of the L2
            penalty, added to the gradient before it enters the window, as in the paper's code, which makes the
            gradient of an embedding dense.
        decoupled_weight_decay: multiply the parameters by (1 - lr * weight_decay) instead.
        normalize: n in F. ``"num_grads"`` divides by m always (the paper); ``"count"`` divides by the gradients held
            so far, which makes the first steps shorter: a warm-up without a schedule. The same once the window is
            full.
        grad_decay: :math:`\beta_1` in [0, 1), decay of an average of the stored *gradients*, with weights
            :math:`\beta_1^{age}`, which is preconditioned in place of the newest alone. Costs no memory and no pass.
        window_dtype: torch.bfloat16 (embeddings stay float32), the default; torch.float32, the default of the identity
            metric, or torch.float64.
        window_device: None for the parameters' device, another such as ``"cpu"``, or a list to split the window over.
            ``"host"`` keeps it in host memory and streams it to the parameters' GPU, which computes.
        masks: {parameter: bool tensor of its shape, True = keep}. Masked coordinates never move and take no room in
            the window.
        process_group: ranks with the same parameters and gradients (as under DistributedDataParallel) that share one
            window: each keeps the columns of some, or of some rows. With ``"auto"`` Trainer's ranks share a window of
            16 MiB or more; None keeps it whole on each. FSDP2 and tensor parallelism do not need it: each rank keeps
            the columns of what it has. In both cases ``state_dict`` does not have the window: `write_window` has.
        row_sparse: store gradients with few non-zero rows by these rows. Exact; turn it off for fixed state shapes.
        save_window: put the window into ``state_dict``. Without it, checkpoints are small and the window refills after
            a resume.

    Raises:
        ValueError: for an option or a mask out of range, before anything changes.
        TypeError: for complex parameters.
        MemoryError: at the first step, if the window does not fit; the message has the numbers and the ways out.

    Source: Frantar, Kurtic and Alistarh, NeurIPS 2021, section 3.2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = BY_METRIC,
        *,
        metric: str = MFAC_METRIC,
        num_grads: int = BY_METRIC,
        damping: float = BY_METRIC,
        betas: tuple[float, float] = BY_METRIC,
        eps: float = BY_METRIC,
        nesterov: bool = BY_METRIC,
        momentum: float = BY_METRIC,
        weight_decay: float = BY_METRIC,
        decoupled_weight_decay: bool = BY_METRIC,
        normalize: str = BY_METRIC,
        grad_decay: float = BY_METRIC,
        window_dtype: torch.dtype = BY_METRIC,
        window_device: torch.device | str | list[torch.device | str] | None = None,
        masks: Mapping[Tensor, Tensor] | None = None,
        process_group: dist.ProcessGroup | str | None = "auto",
        row_sparse: bool = True,
        save_window: bool = True,
    ) -> None:
        settings = settings_of(
            metric,
            {
                "lr": lr,
                "num_grads": num_grads,
                "window_dtype": window_dtype,
                "damping": damping,
                "betas": betas,
                "eps": eps,
                "nesterov": nesterov,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "normalize": normalize,
                "grad_decay": grad_decay,
            },
        )
        shared = {name: settings[name] for name in ParameterWindowOptions.names() if name in settings}
        self._options = ParameterWindowOptions(
            metric=metric,
            window_device=window_device,
            row_sparse=row_sparse,
            save_window=save_window,
            **shared,
        )
        defaults = {**settings, **asdict(self._options)}
        self._process_group, self._batches = check_process_group(process_group), BatchCount()
        self._undecided = isinstance(process_group, str)
        self._start_anew()
        super().__init__(params, defaults)
        check_masks(masks or {}, self.param_groups)
        self._keep_masks(masks or {})
        if metric == "adam":
            warn_of_old_habits(settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, whose columns join the window when their first gradients arrive.

        Raises:
            ValueError: for an option out of range, another value of an option that is common to all groups, or
                parameters on another device; the optimizer stays as it was.
            TypeError: for complex parameters.
        """
        check_group(param_group, {**self.defaults, **asdict(self._options)})
        known = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            check_parameters(self.param_groups)
        except (TypeError, ValueError):
            del self.param_groups[known:]
            raise
        remove_window_options(self.param_groups)
        self.param_groups[-1] |= self._options.scheduled()
        self._known += [id(p) for p in self.param_groups[-1]["params"]]

    @torch.no_grad()
    def set_masks(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Mask more coordinates: they stop where they are, and the window and the momentum forget them.

        The window shrinks to the kept coordinates, exactly as if it had never held the others. Its Gram matrix is
        computed anew, which takes m x m x d operations. Ranks that share a window must all call this, with the same
        masks.

        Args:
            masks: {parameter: bool tensor of its shape, True = keep}; other parameters stay as they are.

        Raises:
            ValueError: for an unknown parameter, another shape or dtype, or a mask that brings back a coordinate
                masked before; nothing changes then.
            MemoryError: if the smaller window does not fit beside the one that it replaces; nothing changes then.
        """
        self._agree()
        check_masks(masks, self.param_groups)
        masks = {p: mask.to(p.device) for p, mask in masks.items()}
        check_only_shrink(masks, self._masks())
        if self._window is not None:
            with without_autocast():
                self._window.shrink(masks)
        for p, mask in masks.items():
            if "momentum_buffer" in self.state[p]:
                self.state[p]["momentum_buffer"].mul_(mask)
        self._keep_masks(masks)
        self._publish()

    def stored_gradients(self, parameter: Tensor) -> Tensor:
        """The gradients that the window holds of one parameter: (count, numel), oldest first, in the window's dtype.

        Raises:
            ValueError: if this rank's window holds none: before the first step with one, or on another rank.
        """
        window = self._window
        if window is None or parameter not in window.placements or window.owners[parameter].is_divided():
            raise ValueError(
                f"the window holds no gradient of a parameter of shape {tuple(parameter.shape)} here: it has not been "
                "stepped with one, or another rank keeps its columns"
            )
        return window.stored_gradients(parameter)

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Store the gradients and move the parameters; those without a gradient stay where they are.

        A gradient with a NaN or infinite entry (or a norm above 1e19) is skipped: neither window nor parameters
        change, and ``skipped_steps`` counts it.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The loss of the closure; None without one.

        Raises:
            ValueError: for a sparse gradient that is not row-sparse, parameters whose numbers cannot be counted once
                over the ranks, ranks with other gradients, or what was changed in ``param_groups`` and cannot be.
                Nothing changes then.
            MemoryError: if the window does not fit; nothing changes then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with without_autocast():
            self._step()
        return loss

    def _step(self) -> None:
        if self._options.metric == "identity":  # Adam's knows no scale of gradients
            self._batches.check()
        self._agree()
        gradients = read_gradients(self.param_groups)
        layout = self._find_layout(gradients)
        self._decide_sharing(gradients)
        ranks = self._process_group if layout is None else layout.group
        if not gradients and ranks is None:
            return
        alike = gradients if layout is None else layout.everywhere
        if not are_finite(gradients, self.param_groups, ranks, alike=alike):
            self._skip_step()
            self._publish()
            return
        if not gradients:
            return
        self._check_layout(gradients)
        masks = self._masks()
        window = self._let_in(gradients, masks)
        scalings = next_scalings(self.param_groups, self.state, gradients)
        window.push(gradients, masks, scalings)
        moves = plan_moves(self.param_groups, self.state, self._options.result_dtype)
        directions = window.directions(gradients, moves)
        apply_directions(self.param_groups, self.state, directions)
        for p in gradients:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
        for p, scaling in scalings.items():
            self.state[p]["moment_step"] = scaling.step
        self._publish()

    def train(self) -> None:
        """Count a batch: Trainer calls this before each. A step that has several may warn of the loss's scale."""
        self._batches.add()

    def trust_loss_scale(self) -> None:
        """Keep that warning back: the gradients of several batches or ranks make up a mean, or somebody has warned."""
        self._batches.trusted = True

    def _skip_step(self) -> None:
        if self.skipped_steps == 0:
            warnings.warn(
                f"a gradient is not finite (or its norm is above {MAX_NORM:g}): this step is skipped, as will be "
                "others like it. They are counted in MFAC.skipped_steps",
                stacklevel=4,
            )
        self.skipped_steps += 1

    def window_stats(self) -> dict[str, float]:
        """Figures for a log: share of the window filled, condition number of K, counts, and size in GiB."""
        window = self._window
        return {
            "window_fill": 0.0 if window is None else window.count / self._options.num_grads,
            "gram_condition": 1.0 if window is None else window.gram.condition(),
            "skipped_steps": float(self.skipped_steps),
            "jitter_escalations": 0.0 if window is None else float(window.gram.jitter_escalations),
            "window_gib": 0.0 if window is None else window.nbytes / GIB,
        }
