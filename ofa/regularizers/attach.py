"""The two regularizers of OFA for any training loop: attach, measure, add the penalty, detach.

Every measured forward pass yields J (step ratio) and H (sharpness) as tensors with a graph; `penalty()` is λ₁J + λ₂H.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ofa import anatomy as anatomies
from ofa.anatomy.fused_layers import fuse_layers, is_fused, unfuse_layers
from ofa.errors import InputError
from ofa.models.introspection import active_dropout, dropouts
from ofa.regularizers import objectives
from ofa.regularizers.branch_hooks import BranchHooks
from ofa.regularizers.estimators import Handle, TraceEstimator
from ofa.regularizers.estimators.choice import choose
from ofa.regularizers.estimators.hutchinson import FullHutchinson
from ofa.regularizers.guards import DeepcopyGuard, ModuleIdentityGuard, ThreadGuard, unwrap
from ofa.regularizers.into_loss import add_penalty, refuse_packed
from ofa.regularizers.measured_pass import MeasuredPass
from ofa.regularizers.options import CONVENTIONS, RegularizerOptions
from ofa.regularizers.recompute import RecomputeTracker
from ofa.regularizers.reminders import Reminders
from ofa.regularizers.schedule import Schedule
from ofa.regularizers.sinks import packed_starts

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Regularizers]] = weakref.WeakKeyDictionary()
"""Attached regularizers by each of their norms and by the model; the model's hooks keep them alive."""


def fused_regularizers(
    model: nn.Module,
    step_ratio: float = 1e-2,
    sharpness: float = 1.0,
    estimator: str = "auto",
    granularity: str = "sublayer",
    samples: int = 1,
    epsilon: float | None = None,
    probe: str = "rademacher",
    convention: str = "theory",
    gradient: str = "preconditioner",
    every: int = 1,
    radial: str = "channels",
    into_loss: bool = False,
    seed: int = 0,
    tokens: str = "no-sinks",
    fuse: bool = False,
) -> Regularizers:
    """Attach the step-ratio and sharpness regularizers of OFA (arXiv 2505.19107) to a Hugging Face model.

    Loss = CE + λ₁ J + λ₂ H with J = Σ_t ‖Z_{t+1} − Z_t‖/‖Z_t − Z_{t−1}‖ and H = Σ_t softplus(h_t), h_t the trace of the
    preconditioned Hessian per token. A term of weight 0 is not measured. Only forward passes with gradients enabled
    are measured; see `Regularizers.measuring` for the others.

    Args:
        model: the model whose `forward` is called in training.
        step_ratio, sharpness: the weights λ₁ and λ₂, ≥ 0.
        estimator: "exact" (closed form: no probes, no noise), "hutchinson" (probes and finite differences: any model),
            or "auto": exact where the model's branches are known, else hutchinson, which is logged.
        granularity: "sublayer" (a step is one branch) or "layer" (a step is one decoder layer, as in the paper).
        samples: probes N per step.
        epsilon: finite-difference step of "hutchinson", the same for all branches; None chooses one per branch, by the
            dtype and by how long its tokens are.
        probe: "rademacher" or "gaussian".
        convention: sign of the trace, "theory" or "algorithm1" (the paper's Algorithm 1 as printed).
        gradient: how H is differentiated. "preconditioner": in γ alone, curvature and tokens held fixed; computed in
            the forward pass. "full": through everything, as the paper's Algorithm 1 under autograd; "exact" then needs
            frozen weights and memory for its graph.
        every: measure the sharpness in one optimizer step of `every`, and use its last gradient in between. Steps are
            detected by the version counters of the scales, which every optimizer in `torch.optim` changes.
        radial: how "exact" computes the terms that need every token's own Jacobian in training: "channels" (through the
            8 channels that hold most of them), "exact" or "none". Passes without gradients always use "exact".
        into_loss: add the penalty to the model's own `loss` (for `transformers.Trainer` and TRL).
        seed: seed of the probes.
        tokens: which real tokens count for the step ratio: "no-sinks" leaves out the first one of every sequence and
            those of which one step is more than 10 times as long as the median of the row (massive activations);
            "all", as in the paper; or only the "last" one.
        fuse: also `ofa.fuse_layers(model)`, until `close()`; lengths of steps are then measured by the residual sums.

    Returns:
        The attached `Regularizers`; `penalty()` is the term to add to the loss.

    Raises:
        InputError: an option is out of range, the model's steps are not recognized, or it is already regularized.

    Example:
        >>> params = ofa.tune_norms(model)
        >>> reg = ofa.fused_regularizers(model)
        >>> loss = model(**batch).loss + reg.penalty()
        >>> loss.backward()
        >>> all(scale.grad is not None for scale in params)
        True
        >>> reg.close()
    """
    options = RegularizerOptions(
        step_ratio=step_ratio,
        sharpness=sharpness,
        estimator=estimator,
        granularity=granularity,
        samples=samples,
        epsilon=epsilon,
        probe=probe,
        convention=convention,
        gradient=gradient,
        every=every,
        radial=radial,
        seed=seed,
        tokens=tokens,
    )
    model = unwrap(model)
    if attached(model) is not None:
        raise InputError(
            "this model, or one that it shares modules with, already has regularizers attached; close() them before "
            "attaching others (ofa.regularizers.attached(model) finds them)"
        )
    found = anatomies.find(model)
    chosen: TraceEstimator = FullHutchinson()  # attaches no hooks: used if nothing is traced
    if sharpness > 0:
        chosen = choose(options, model, found)
    regularizers = Regularizers(model, found, chosen, options, into_loss=into_loss)
    if fuse and not is_fused(model):
        regularizers._handles.append(_FusedLayers(model))
    return regularizers


def attached(model: nn.Module) -> Regularizers | None:
    """The regularizers attached to a model or to one that shares modules with it, such as a wrapper; or None.

    Returns:
        The regularizers, or None.

    Example:
        >>> reg = ofa.fused_regularizers(model)
        >>> ofa.regularizers.attached(model) is reg
        True
        >>> reg.close()
        >>> ofa.regularizers.attached(model) is None
        True
    """
    for module in model.modules():
        reference = _attached.get(module)
        found = None if reference is None else reference()
        if found is not None:
            return found
    return None


class Regularizers:
    """The regularizers attached by `fused_regularizers`; as a context manager they close themselves.

    Example:
        >>> with ofa.fused_regularizers(model, sharpness=0.3) as reg:
        ...     with torch.no_grad(), reg.measuring():  # also outside training
        ...         _ = model(**batch)
        ...     measured = reg.measurements
        ...     penalty = 1e-2 * measured.step_ratio + 0.3 * measured.sharpness
        ...     torch.testing.assert_close(reg.penalty(), penalty)
        ...     reg.forget()  # frees the graph of the measurement
        >>> reg.close()  # the context manager has done so; a second call does nothing
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: anatomies.Anatomy,
        estimator: TraceEstimator,
        options: RegularizerOptions,
        *,
        into_loss: bool,
    ) -> None:
        self.anatomy = anatomy
        self.steps = steps = anatomy.steps(options.granularity)
        self.estimator = estimator.name
        self._trace_estimator = estimator
        self.passes = 0
        """Measured forward passes so far; the next pass's probes depend only on this and the seed."""
        self._options = options
        self._into_loss = into_loss
        self._model = weakref.ref(model, _forgetting(self))
        self._signature = inspect.signature(model.forward)
        # PEFT passes unknown arguments on to the model that it wraps.
        held = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._takes_cache = "use_cache" in inspect.signature(held.forward).parameters
        self._pass: MeasuredPass | None = None
        self._measured: objectives.Measurements | None = None
        self._device = torch.device("cpu")
        self._without_grad = False
        self._dropouts = dropouts(model)
        self._thread = ThreadGuard()
        self.schedule = Schedule(options.every)
        self._reminders = Reminders()
        active = options.step_ratio > 0 or options.sharpness > 0
        self._layers = {step.layer: RecomputeTracker() for step in steps}
        firsts = {step.layer: index for index, step in reversed(list(enumerate(steps)))}
        self._meters = [
            BranchHooks(
                model,
                index,
                step,
                branch,
                estimator,
                anatomy.layers[step.layer],
                self._layers[step.layer],
                first=index == firsts[step.layer],
            )
            for index, step in enumerate(steps if active else ())
            for branch in step.branches
        ]
        self._handles: list[Handle] = [handle for meter in self._meters for handle in meter.handles]
        branches = [meter.branch for meter in self._meters]
        if options.sharpness > 0:
            self._handles += estimator.attach(model, branches)
        ends = {path for branch in branches for path in (branch.entry, branch.exit)}
        if active:
            # A recomputed layer may raise in the backward pass, outside the model's own hook.
            for module in map(model.get_submodule, sorted(ends)):
                self._handles.append(module.register_forward_hook(self._at_failure, always_call=True))
            self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._after, with_kwargs=True, always_call=True))
            self._handles.append(DeepcopyGuard(model, (h for h in self._handles if isinstance(h, RemovableHandle))))
        norms = [branch.norm.path for branch in branches]
        self._places = ModuleIdentityGuard(
            model, [*norms, *sorted(ends), *(estimator.relies_on if options.sharpness > 0 else ())]
        )
        for module in (model, *map(model.get_submodule, norms)):
            _attached[module] = weakref.ref(self)

    @property
    def measurements(self) -> objectives.Measurements:
        """The measurements of the last measured forward pass, with their graph.

        Raises:
            RuntimeError: no forward pass has been measured yet.
        """
        self._reminders.used = True
        if self._measured is None:
            raise RuntimeError(
                "no forward pass has been measured: call the model with gradients enabled, or inside measuring()"
            )
        return self._measured

    def penalty(self) -> Tensor:
        """λ₁ J + λ₂ H of the last measured forward pass, a float32 scalar with its graph.

        Raises:
            RuntimeError: no forward pass has been measured, or the last one raised.
        """
        if not self._meters:
            return torch.zeros(())
        weights = self._options.step_ratio, self._options.sharpness
        return objectives.penalty(self.measurements, *weights, self._device)

    @contextmanager
    def measuring(self) -> Iterator[Regularizers]:
        """Also measure forward passes without gradients, inside this context."""
        before, self._without_grad = self._without_grad, True
        try:
            yield self
        finally:
            self._without_grad = before

    def forget(self) -> None:
        """Release the last measurement and its graph."""
        self._measured = None

    @property
    def measures(self) -> bool:
        """Whether a term has a weight above 0."""
        return bool(self._meters)

    @property
    def in_loss(self) -> bool:
        """Whether the model's own loss carries the penalty."""
        return self._into_loss

    @property
    def not_replayable(self) -> str | None:
        """Why a CUDA graph cannot replay a measured pass, such as probes that must change in each; or None."""
        if self._options.sharpness > 0 and self.estimator != "exact":
            return f"a graph would repeat the probes of estimator={self.estimator!r}"
        if self._options.sharpness > 0 and self._options.every > 1:
            return f"a graph would repeat one of the {self._options.every} kinds of step of every={self._options.every}"
        return None

    def replayed(self, passes: int, measured: objectives.Measurements | None) -> None:
        """Take the measurements of a pass that a CUDA graph repeated, after `passes` passes in all.

        Example:
            >>> reg = ofa.fused_regularizers(model)
            >>> reg.replayed(reg.passes + 1, None)
            >>> reg.passes
            1
            >>> reg.close()
        """
        self.passes, self._measured = passes, measured

    def close(self) -> None:
        """Detach: remove every hook, so that the model is as before attaching. A second call does nothing."""
        self._reminders.at_end()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._set_pass(None)
        for module in [module for module, reference in _attached.items() if reference() is self]:
            del _attached[module]

    def __deepcopy__(self, memo: object) -> Regularizers:
        raise InputError(
            "a part of a model with regularizers attached cannot be copied; copy the whole model (the copy has no "
            "regularizers), or close() them before"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InputError(
            "a model with regularizers attached cannot be pickled or sent to another process; close() them before, or "
            "save its state_dict()"
        )

    def __enter__(self) -> Regularizers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.compiler.disable
    def _before(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        self._thread.check()
        self._set_pass(None)
        if not torch.is_grad_enabled() and not self._without_grad:
            return None
        self._measured = None
        if torch.is_grad_enabled():
            self._reminders.before_pass(model)
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        self._refuse_cache(given)
        if self._into_loss:
            refuse_packed(given)
        traced = self._options.sharpness > 0 and self.schedule.measures(self._weights())
        self._refuse_dropout(traced)
        self._places.check()
        self._thread.begin()
        options = self._options
        self._set_pass(
            MeasuredPass(
                seed=self._pass_seed(),
                with_grad=torch.is_grad_enabled(),
                lengths=options.step_ratio > 0,
                tokens=options.tokens,
                traced=traced,
                held=self._trace_estimator.held,
                sign=CONVENTIONS[options.convention],
                mask=_padding_mask(given.get("attention_mask")),
                starts=packed_starts(given),
            )
        )
        self.passes += 1
        if self._takes_cache and given.get("use_cache") is None:
            return args, {**kwargs, "use_cache": False}
        return None

    @torch.compiler.disable
    def _after(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        if self._thread.elsewhere:  # this thread's pass was refused
            return None
        current = self._pass
        self._set_pass(None)
        if current is None or output is None:  # output is None if forward raised; let it propagate
            return None
        self._measured = self.schedule.complete(current.measurements(len(self.steps)), current.gradients)
        values = self._measured.step_norms, self._measured.sharpness
        self._device = next(value.device for value in values if value is not None)
        return add_penalty(model, kwargs, output, self.penalty()) if self._into_loss else None

    def _weights(self) -> list[Tensor]:
        return [meter.norm_module.weight for meter in self._meters]  # type: ignore[misc]

    def _abandon(self) -> None:
        """Release the state of branches that were entered and not left."""
        self._trace_estimator.abandon()
        for meter in self._meters:
            meter.abandon()

    def _at_failure(self, module: nn.Module, args: object, output: object) -> None:
        if output is None:  # the module raised; let it propagate
            self._abandon()

    def _set_pass(self, current: MeasuredPass | None) -> None:
        self._abandon()
        self._pass = current
        if current is None:
            self._thread.end()
        again = current and current.again()
        for layer in self._layers.values():
            if current is None or again is None:
                layer.end()
            else:
                layer.begin(current, again)

    def _pass_seed(self) -> int:
        """A different 63-bit seed for every (seed, pass)."""
        return ((self._options.seed & 0x7FFFFFFF) << 32) | (self.passes & 0xFFFFFFFF)

    def _refuse_cache(self, given: dict[str, object]) -> None:
        if given.get("use_cache") or given.get("past_key_values") is not None:
            raise InputError(
                "a measured forward pass cannot use a key-value cache; call the model with use_cache=False, or inside "
                "torch.no_grad() to leave it unmeasured"
            )

    def _refuse_dropout(self, traced: bool) -> None:
        active = active_dropout(self._dropouts) if traced else None
        if active is not None:
            raise InputError(
                f"dropout is active in {active}, but traces are defined without it; call model.eval() before training "
                "(gradients still flow), or set its rate to 0"
            )


class _FusedLayers:
    """The layers fused for the regularizers, until removed."""

    def __init__(self, model: nn.Module) -> None:
        fuse_layers(model)
        self._model = weakref.ref(model)

    def remove(self) -> None:
        """Give the layers back their own forward pass."""
        model = self._model()
        if model is not None:
            unfuse_layers(model)


def _forgetting(regularizers: Regularizers) -> Callable[[object], None]:
    """A weakref callback that releases the measurement with the model: Python cannot collect cycles through a graph."""
    reference = weakref.ref(regularizers)

    def forget(_: object) -> None:
        found = reference()
        if found is not None:
            found.forget()

    return forget


def _padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """A (B, T) mask of ones and zeros; None for masks of higher rank, from which padding cannot be read."""
    if attention_mask is None or not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask.to(torch.float32)
