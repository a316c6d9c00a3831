"""What two processes check together: `python -m tests.ofa.on_two_ranks FOLDER`, once per rank; see test_sharded.py.

Starting a process group costs seconds and a check milliseconds, so that all of them share one group. The oracle is one
process that sees both ranks' sequences, in float64.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import ofa
from ofa import sharding
from ofa.adapters.base_norms import fingerprints
from ofa.tuning.norms import base_parameters
from ofa_kernels import dispatch
from tests.families import build, inputs
from tests.ofa.traces import EVERY

RANKS = 2
STEPS = 3
WEIGHTS = {"step_ratio": 0.3, "sharpness": 0.2}
TOLERANCE = 1e-12
"""In float64: the ranks' sums are added in another order, some hundred roundings of 1e-16 of gradients below 10."""

Check = Callable[[Path], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check; it is given a folder of its own that both ranks see."""
    CHECKS[function.__name__] = function
    return function


def cases(*arguments: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a check once for each of its arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for given in arguments:
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            CHECKS[f"{function.__name__}({said})"] = lambda folder, given=given: function(**given)  # type: ignore[misc]
        return function

    return register


# Training, together and alone


def batch(name: str, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
    return {key: value[rows].cpu() for key, value in inputs(name, sequences=2 * RANKS, seed=step).items()}


def rows_of(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def model_of(name: str, dtype: torch.dtype = torch.float64, *, checkpointing: bool = False) -> nn.Module:
    model = build(name).to("cpu", dtype)  # gloo's device, also beside a GPU
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def scales_of(model: nn.Module) -> Tensor:
    sharding.reshard(model)
    return torch.cat([sharding.full_tensor(p).detach() for p in model.parameters() if p.requires_grad])


def train(trained: nn.Module, reg: Any, name: str, rows: slice) -> Tensor:
    """Some steps of an ordinary loop; returns the scales."""
    optimizer = optimizer_of(trained)
    for step in range(STEPS):
        loss = trained(**batch(name, step, rows)).loss + reg.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return scales_of(trained)


@functools.cache
def joined(name: str, *, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    """The scales after one process trained on the sequences of all ranks."""
    model = model_of(name, dtype)
    ofa.tune_norms(model)
    with ofa.fused_regularizers(model, **WEIGHTS, **options) as reg:
        return train(model, reg, name, slice(None))


def averaged(name: str, *, dtype: torch.dtype = torch.float64, checkpointing: bool = False, **options: Any) -> Tensor:
    """The scales after one process averaged the gradients of each rank's sequences, measured with its own probes."""
    model = model_of(name, dtype, checkpointing=checkpointing)
    ofa.tune_norms(model)
    optimizer = optimizer_of(model)
    with ofa.fused_regularizers(model, **WEIGHTS, **options) as reg:  # once: the default ε is that of the first scales
        for step in range(STEPS):
            for rank in range(RANKS):
                reg._options, reg.passes = reg._options.model_copy(update={"seed": rank}), step
                loss = model(**batch(name, step, rows_of(rank))).loss + reg.penalty()
                (loss / RANKS).backward()
            optimizer.step()
            optimizer.zero_grad()
    return scales_of(model)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block raises an InputError of one line that has these words."""
    with pytest.raises(ofa.InputError) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# DistributedDataParallel


@cases(
    *({"kind": "exact", "order": order} for order in ("tune attach wrap", "tune wrap attach")),
    *({"kind": kind, "order": "tune wrap attach"} for kind in EVERY if kind != "exact"),
)
def ddp_trains_as_one_process(kind: str, order: str) -> None:
    model = trained = model_of("llama")
    reg: Any = None
    for what in order.split():
        if what == "tune":
            ofa.tune_norms(model)
        elif what == "wrap":
            trained = DistributedDataParallel(model)
        else:
            reg = ofa.fused_regularizers(trained, **WEIGHTS, **EVERY[kind], seed=dist.get_rank())
    together = kind.startswith("exact")
    oracle = joined("llama", **EVERY[kind]) if together else averaged("llama", **EVERY[kind])
    assert_same(train(trained, reg, "llama", rows_of(dist.get_rank())), oracle)


@cases(*({"launcher": launcher} for launcher in ("ddp", "fsdp")))
def float32_is_as_near_to_the_truth_as_one_process(launcher: str) -> None:
    """Both add up the same numbers in other orders: neither can be much further from float64 than the other."""
    model = model_of("llama", torch.float32)
    ofa.tune_norms(model)
    trained = DistributedDataParallel(model) if launcher == "ddp" else sharded(model, "layers")
    reg = ofa.fused_regularizers(trained, **WEIGHTS)
    together = train(trained, reg, "llama", rows_of(dist.get_rank())).double()
    alone, truth = joined("llama", dtype=torch.float32).double(), joined("llama")
    error, own_error = (together - truth).abs().max(), (alone - truth).abs().max()
    assert error <= 4 * own_error, (error, own_error)


@check
def unequal_shares_are_weighted_by_their_sequences(folder: Path) -> None:
    """Ranks are averaged equally: with 1 and 3 sequences, their weights are 1/2 and 3/2."""
    rows = (slice(0, 1), slice(1, 4))[dist.get_rank()]
    gradients = []
    for share in (1.0, (rows.stop - rows.start) * RANKS / 4):
        model = model_of("llama")
        parameters = ofa.tune_norms(model)
        trained = DistributedDataParallel(model)
        with ofa.fused_regularizers(trained, **WEIGHTS) as reg:
            ((trained(**batch("llama", 0, rows)).loss + reg.penalty()) * share).backward()
        gradients.append(torch.cat([p.grad for p in parameters if p.grad is not None]))
    model = model_of("llama")
    parameters = ofa.tune_norms(model)
    with ofa.fused_regularizers(model, **WEIGHTS) as reg:
        (model(**batch("llama", 0)).loss + reg.penalty()).backward()
    whole = torch.cat([p.grad for p in parameters if p.grad is not None])
    assert_same(gradients[1], whole)
    assert (gradients[0] - whole).abs().max() > 1e-3


@check
def what_cannot_be_trained_together_is_refused(folder: Path) -> None:
    model = model_of("llama")
    wrapped = DistributedDataParallel(model)
    with refused("before wrapping it"):
        ofa.tune_norms(wrapped)
    with refused("nn.DataParallel"):
        ofa.fused_regularizers(nn.DataParallel(model_of("llama")))
    with refused("FSDP2"):
        ofa.fused_regularizers(FullyShardedDataParallel(model_of("llama"), device_id=torch.device("cpu")))


# fully_shard


def sharded(model: Any, units: str, **options: Any) -> Any:
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    if units == "parts of layers":
        for layer in layers:
            fully_shard(layer.self_attn)
            fully_shard(layer.mlp)
    if units == "projections":
        for module in (module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)):
            fully_shard(module)
    if units != "whole":
        for layer in layers:
            fully_shard(layer, **options)
    if units == "as accelerate does":
        fully_shard(model.model.embed_tokens)
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    return fully_shard(model, **options)


@cases(
    *(
        {"units": "layers", "order": order}
        for order in ("tune attach shard", "tune shard attach", "shard tune attach", "shard attach tune")
    ),
    *(
        {"units": units, "order": order}
        for units in ("whole", "parts of layers", "projections", "as accelerate does")
        for order in ("tune attach shard", "tune shard attach")
    ),
)
def fsdp_trains_as_one_process(units: str, order: str) -> None:
    model: Any = model_of("llama")
    # The closed form takes frozen weights for constants: what is attached first finds them so.
    model.requires_grad_(order.index("tune") < order.index("attach"))
    reg: Any = None
    for what in order.split():
        if what == "tune":
            ofa.tune_norms(model)
        elif what == "shard":
            sharded(model, units)
        else:
            reg = ofa.fused_regularizers(model, **WEIGHTS)
    assert reg.estimator == "exact"
    assert_same(train(model, reg, "llama", rows_of(dist.get_rank())), joined("llama"))


@cases(
    *({"name": name} for name in ("gpt2", "bert", "vit", "gpt_neox", "qwen3")),
    {"name": "opt_post_norm", "granularity": "layer"},
    *(
        {"name": "llama", "kind": kind, "granularity": granularity, "checkpointing": checkpointing}
        for kind, granularity, checkpointing in (
            ("exact", "sublayer", True),
            ("exact, full", "sublayer", True),
            ("hutchinson", "sublayer", True),
            ("hutchinson, full", "sublayer", True),
            ("hutchinson", "layer", True),
        )
    ),
)
def fsdp_averages_the_gradients_of_the_ranks(
    name: str, kind: str | None = None, checkpointing: bool = False, **options: Any
) -> None:
    options |= {} if kind is None else EVERY[kind]
    model = model_of(name, checkpointing=checkpointing)
    ofa.tune_norms(model)
    sharded(model, "layers")
    reg = ofa.fused_regularizers(model, **WEIGHTS, seed=dist.get_rank(), **options)
    actual = train(model, reg, name, rows_of(dist.get_rank()))
    assert_same(actual, averaged(name, checkpointing=checkpointing, **options))


@cases(
    *({"units": units, "order": order} for units in ("layers", "whole") for order in ("fuse shard", "shard fuse")),
)
def fsdp_trains_fused_layers_as_one_process(units: str, order: str) -> None:
    """A sum computes the next norm ahead where the norm's scale is gathered, in the same unit."""
    model: Any = model_of("gpt2")
    ofa.tune_norms(model)
    for what in order.split():
        if what == "shard":
            sharded(model, units)
        else:
            assert ofa.fuse_layers(model) == {}
    reg = ofa.fused_regularizers(model, **WEIGHTS)
    sums, norm_step = [], dispatch.norm_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "norm_step", lambda *args, **kw: sums.append(args) or norm_step(*args, **kw))
        assert_same(train(model, reg, "gpt2", rows_of(dist.get_rank())), joined("gpt2"))
    assert len(sums) == STEPS * (3 if units == "layers" else 6)


@check
def fsdp_accumulates(folder: Path) -> None:
    """The first micro-batch is not reduced, the second is."""
    model: Any = model_of("llama")
    ofa.tune_norms(model)
    sharded(model, "layers")
    reg = ofa.fused_regularizers(model, **WEIGHTS)
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        for part in range(2):
            row = rows_of(dist.get_rank()).start + part
            model.set_requires_gradient_sync(part == 1)
            ((model(**batch("llama", step, slice(row, row + 1))).loss + reg.penalty()) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(scales_of(model), joined("llama"))


@cases({"launcher": "ddp"}, {"launcher": "fsdp"})
def one_of_two_steps_is_measured(launcher: str) -> None:
    """Ranks notice the same steps, also by the versions of scales that are in parts between passes."""
    model = model_of("llama")
    ofa.tune_norms(model)
    trained = DistributedDataParallel(model) if launcher == "ddp" else sharded(model, "layers")
    reg = ofa.fused_regularizers(trained, **WEIGHTS, every=2)
    found = train(trained, reg, "llama", rows_of(dist.get_rank()))
    assert_same(found, joined("llama", every=2))
    assert (found - joined("llama")).abs().max() > 1e-6


@cases({"mixed": False}, {"mixed": True})
def fsdp_keeps_scales_in_float32(mixed: bool) -> None:
    """A bfloat16 model with float32 scales, and a float32 model that computes in bfloat16."""
    model = model_of("llama", torch.float32 if mixed else torch.bfloat16)
    ofa.tune_norms(model)
    start = scales_of(model)
    sharded(model, "layers", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16 if mixed else None))
    scales = train(model, ofa.fused_regularizers(model, **WEIGHTS), "llama", rows_of(dist.get_rank()))
    assert scales.dtype == torch.float32
    if not mixed:
        # The same numbers are computed; the mean of two gradients is rounded once or twice.
        torch.testing.assert_close(scales, averaged("llama", dtype=torch.bfloat16), rtol=0, atol=1e-6)
    moved, expected = scales - start, joined("llama").float() - start
    # AdamW steps by the sign of a gradient at first, and bfloat16 turns the sign of the smallest: of half a hundredth.
    assert torch.cosine_similarity(moved, expected, 0) > 0.98


@check
def attaching_leaves_a_sharded_model_as_it_was(folder: Path) -> None:
    """All parameters in parts again, no hook left, and the same numbers."""

    def state() -> list[Any]:
        modules = [(type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return [modules, [(id(p), type(p), p.requires_grad) for p in model.parameters()]]

    model = model_of("llama")
    ofa.tune_norms(model)
    sharded(model, "as accelerate does")
    with torch.no_grad():
        logits = model(**batch("llama", 0)).logits
    sharding.reshard(model)
    before = state()
    ofa.fused_regularizers(model, **WEIGHTS).close()
    assert state() == before
    with torch.no_grad():
        assert torch.equal(model(**batch("llama", 0)).logits, logits)


@check
def what_cannot_be_sharded_is_refused(folder: Path) -> None:
    narrow = sharded(model_of("llama", torch.bfloat16), "layers")
    with refused("bfloat16", "before fully_shard"):
        ofa.tune_norms(narrow)
    model = model_of("llama")
    ofa.tune_norms(model)
    fully_shard(model.model.layers[0].input_layernorm)  # type: ignore[union-attr,index]
    sharded(model, "layers")
    with ofa.fused_regularizers(model), refused("input_layernorm", "whole layers"):
        model(**batch("llama", 0))
    with refused("load the model again"):
        ofa.restore_norms(model)
    with refused("merged"):
        ofa.merge(model, folder / "adapter", folder / "out")


# Adapters


def tuned_and_sharded() -> tuple[nn.Module, Tensor]:
    model = model_of("llama", torch.float32)
    ofa.tune_norms(model)
    sharded(model, "layers")
    return model, train(model, ofa.fused_regularizers(model), "llama", rows_of(dist.get_rank()))


def saved_scales(folder: Path) -> Tensor:
    model = model_of("llama", torch.float32)
    ofa.load_adapter(model, folder)
    return torch.cat([model.get_parameter(path) for path in base_parameters(model)])


@check
def a_sharded_model_is_saved_once_and_loaded_anywhere(folder: Path) -> None:
    """Every rank returns when the folder is there; base and scales are those of the whole model."""
    model, scales = tuned_and_sharded()
    with torch.no_grad():  # leaves the last parameters gathered
        logits = model(**batch("llama", 0)).logits
    assert ofa.save_adapter(model, folder / "adapter") == folder / "adapter"
    assert torch.equal(saved_scales(folder / "adapter"), scales)
    details = json.loads((folder / "adapter" / "ofa_config.json").read_text())
    assert details["base_fingerprint"] == fingerprints(model_of("llama", torch.float32))["base_fingerprint"]
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    other = sharded(model_of("llama", torch.float32), "layers")
    ofa.load_adapter(other, folder / "adapter")
    with torch.no_grad():
        assert torch.equal(other(**batch("llama", 0)).logits, logits)


@check
def scales_tuned_in_their_shards_are_restored(folder: Path) -> None:
    model = sharded(model_of("llama", torch.float32), "layers")
    before = {name: sharding.full_tensor(parameter).clone() for name, parameter in model.named_parameters()}
    ofa.tune_norms(model)
    train(model, ofa.fused_regularizers(model), "llama", rows_of(dist.get_rank()))
    ofa.save_adapter(model, folder / "adapter")  # refuses to load where the base's fingerprint is another
    assert torch.equal(saved_scales(folder / "adapter"), scales_of(model))
    ofa.restore_norms(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(
        torch.equal(sharding.full_tensor(parameter), before[name]) for name, parameter in model.named_parameters()
    )


@check
def a_wrapped_model_is_saved_by_every_rank_or_by_the_first_alone(folder: Path) -> None:
    model = model_of("llama", torch.float32)
    ofa.tune_norms(model)
    trained = DistributedDataParallel(model)
    scales = train(trained, ofa.fused_regularizers(trained), "llama", rows_of(dist.get_rank()))
    ofa.save_adapter(trained, folder / "every")
    assert torch.equal(saved_scales(folder / "every"), scales)
    if dist.get_rank() == 0:
        ofa.save_adapter(trained, folder / "first")
    dist.barrier()
    assert torch.equal(saved_scales(folder / "first"), scales)
    with refused("already holds"):
        ofa.save_adapter(trained, folder / "every")
    ofa.save_adapter(trained, folder / "every", overwrite=True)
    ofa.restore_norms(trained)
    assert all(parameter.requires_grad for parameter in model.parameters())


@check
def ranks_that_hold_something_else_are_told(folder: Path) -> None:
    """The wrapper does not average gradients of norms that were tuned inside it."""
    model = model_of("llama", torch.float32)
    trained = DistributedDataParallel(model)
    ofa.tune_norms(trained.module)
    train(trained, ofa.fused_regularizers(trained), "llama", rows_of(dist.get_rank()))
    if dist.get_rank() == 0:
        ofa.save_adapter(trained, folder / "adapter")
    else:
        with refused("rank 1", "different norm scales"):
            ofa.save_adapter(trained, folder / "adapter")


@check
def nobody_waits_for_ever(folder: Path) -> None:
    model = model_of("llama", torch.float32)
    if dist.get_rank() > 0:
        sharding.WAIT = timedelta(seconds=0.2)
        with refused("rank 1 waited for rank 0"):
            ofa.save_adapter(model, folder / "adapter")


@check
def a_rank_that_died_is_noticed(folder: Path) -> None:
    """The last one: nothing can be done together from here on."""
    model, _ = tuned_and_sharded()
    dist.barrier()
    if dist.get_rank() == 0:
        with refused("could not be gathered", "every rank"):
            ofa.save_adapter(model, folder / "adapter")


def main(folder: Path) -> None:
    """Every check in turn, its traceback or "" in the rank's own file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=30))
    outcomes = {}
    for number, (name, function) in enumerate(CHECKS.items()):
        try:
            function(folder / str(number))
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
        # Written at once: where the ranks part ways, the others are still told of.
        (folder / f"rank-{rank}.json").write_text(json.dumps(outcomes))
    os._exit(0)  # at once, as one that dies


if __name__ == "__main__":
    main(Path(sys.argv[1]))
