"""Algorithm 1 of OFA (arXiv 2505.19107) as a plain loop: every step is run again for every probe.

The baseline of the benchmarks, and an independent check of `ofa.fused_regularizers`: the same definitions and probes
without batching, sharing or fusing.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ofa import anatomy
from ofa.anatomy.module_io import hidden_input, hidden_output, replace_tensors
from ofa_kernels.philox import probes

SIGNS = {"theory": -1.0, "algorithm1": 1.0}


class PlainLoop:
    """Measures J and H of every forward pass of a model; use `penalty()` and `close()` as with `ofa.Regularizers`.

    Options are those of `ofa.fused_regularizers`. Granularity "layer" works for any family, "sublayer" only if every
    step is one module that reads a norm of the stream (Llama and similar families).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        step_ratio: float = 1e-2,
        sharpness: float = 1e-3,
        granularity: str = "layer",
        samples: int = 1,
        epsilon: float = 1e-3,
        convention: str = "theory",
        seed: int = 0,
    ) -> None:
        self.step_ratio, self.sharpness, self.samples, self.epsilon = step_ratio, sharpness, samples, epsilon
        self.whole_layers = granularity == "layer"
        self.sign, self.seed, self.passes = SIGNS[convention], seed, 0
        self._running_again = False
        self._takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        steps = anatomy.find(model).steps(granularity)
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for index, step in enumerate(steps):
            branch = step.branches[0]
            if len(step.branches) > 1 or branch.entry != branch.exit or step.scale != 1:
                raise ValueError(f"step {index} is not one module added to the stream; use granularity='layer'")
            norm, module = model.get_submodule(branch.norm.path), model.get_submodule(branch.exit)
            after = partial(self._after_step, index, norm, branch.norm)
            self._handles.append(norm.register_forward_pre_hook(self._before_norm))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def penalty(self) -> Tensor:
        """λ₁ J + λ₂ H of the last forward pass, a scalar with its graph."""
        ratios = [now / before for before, now in zip(self._lengths, self._lengths[1:], strict=False)]
        J = torch.stack(ratios).sum(0).mean()
        H = torch.stack([F.softplus(h) for h in self._traces]).sum(0).mean()
        return self.step_ratio * J + self.sharpness * H

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> PlainLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._mask = kwargs.get("attention_mask")
        self._lengths: list[Tensor] = []
        self._traces: list[Tensor] = []
        self._key = (self.seed << 32) | self.passes
        self.passes += 1
        # A step that is run again must not read its own keys and values from a cache.
        return (args, {**kwargs, "use_cache": False}) if self._takes_cache else None

    def _before_norm(self, norm: nn.Module, args: Any) -> None:
        if not self._running_again:
            self._norm_input = args[0]

    def _after_step(
        self, index: int, norm: nn.Module, form: anatomy.Norm, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        if self._running_again:
            return
        given = hidden_input(args, kwargs)
        Z = given if self.whole_layers else self._norm_input

        def step(moved: Tensor) -> Tensor:
            # Displaced in float32 if the scale is float32, then cast to the stream's dtype.
            entering = (moved if self.whole_layers else norm(moved)).to(given.dtype)
            moved_args, moved_kwargs = replace_tensors(args, kwargs, lambda _, x: entering if x is given else x)
            leaving = hidden_output(module(*moved_args, **moved_kwargs))
            return leaving - moved if self.whole_layers else leaving

        update = hidden_output(output) - Z if self.whole_layers else hidden_output(output)
        self._lengths.append(self._sum_over_tokens(update.square().sum(-1)).sqrt())
        P = self._preconditioner(norm, form)
        nus = probes(Z[..., 0].numel(), Z.shape[-1], samples=self.samples, seed=self._key, step=index)
        h = torch.zeros_like(self._lengths[-1])
        self._running_again = True
        for nu in nus.to(Z).view(self.samples, *Z.shape):
            change = step(Z + self.epsilon * P * nu) - update
            h = h + self._sum_over_tokens((nu * change).sum(-1)) / self._tokens(Z)
        self._running_again = False
        self._traces.append(self.sign * h / (self.epsilon * self.samples))

    def _preconditioner(self, norm: nn.Module, form: anatomy.Norm) -> Tensor:
        """The diagonal of P = diag(γ)/σ for every token: (B, T, d)."""
        x = self._norm_input
        centred = x - x.mean(-1, keepdim=True) if form.kind == "layer" else x
        return (norm.weight + form.offset) / (centred.square().mean(-1, keepdim=True) + form.eps).sqrt()

    def _sum_over_tokens(self, rows: Tensor) -> Tensor:
        return (rows if self._mask is None else rows * self._mask).sum(1)

    def _tokens(self, Z: Tensor) -> Tensor | int:
        return Z.shape[1] if self._mask is None else self._mask.sum(1)
