"""The examples with training loops, run small: trained parameters, and the penalty's weight in a step."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.data import DataLoader

import ofa
from ofa.adapters.read import read_adapter
from tests import families

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|deprecated|pin_memory|litlogger).*"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

LOOPS = ["plain_loop", "trainer", "sft_trainer", "accelerate_loop", "lightning_module"]


def example(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, model: Path, out: Path, *options: str, rounds: int = 2) -> dict[str, Tensor]:
    """The adapter of `rounds` epochs (steps in the plain loop), in a new folder."""
    length = "--steps" if name == "plain_loop" else "--epochs"
    example(name).main(["--model", str(model), "--out", str(out), length, str(rounds), *options])
    return read_adapter(out).parameters


@pytest.mark.parametrize("name", LOOPS)
def test_it_tunes_the_norms_and_says_so(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every scale has changed, the adapter is saved, J and H are printed as numbers."""
    tuned = run(name, tiny_folder, tmp_path / "adapter")
    assert len(tuned) == 7
    assert all(float((scale - 1).abs().max()) > 1e-4 for scale in tuned.values())
    printed = capsys.readouterr().out
    for term in ("J", "H"):
        values = [float(value) for value in re.findall(rf"\b{term} (\S+?)[,\s]", printed + " ")]
        assert values, f"{term} is not printed"
        assert all(0 < value < 100 for value in values)
    assert f"saved {tmp_path / 'adapter'}" in printed


@contextmanager
def weights_of_penalty(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The weight that each optimizer step gives to the penalty, in any loop."""
    penalty, weights = torch.zeros((), requires_grad=True), []
    attach = ofa.fused_regularizers

    def attach_with(*args: Any, **kwargs: Any) -> Any:
        reg = attach(*args, **kwargs)
        reg.penalty = lambda: penalty
        return reg

    def keep(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        weights.append(float(penalty.grad))
        penalty.grad = None

    monkeypatch.setattr(ofa, "fused_regularizers", attach_with)
    # After the step: Lightning computes the gradients of the last batch inside it.
    handle = register_optimizer_step_post_hook(keep)
    yield weights
    handle.remove()


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", LOOPS)
def test_the_penalty_weighs_one_in_every_step(
    name: str, accumulate: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten shots in batches of three, three, three and one, each step one batch or all four."""
    with weights_of_penalty(monkeypatch) as weights:
        run(name, tiny_folder, tmp_path / "adapter", "--batch-size", "3", "--accumulate", str(accumulate))
    expected = 2 if name == "plain_loop" or accumulate == 4 else 8
    assert weights == pytest.approx([1.0] * expected, abs=1e-6)


@pytest.mark.parametrize("name", ["accelerate_loop", "lightning_module"])
def test_it_ends_where_the_plain_loop_ends(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Three steps over all shots at once, whose order does not matter."""
    plain, other = (
        run(which, tiny_folder, tmp_path / which, "--batch-size", "10", rounds=3) for which in ("plain_loop", name)
    )
    for path, scale in plain.items():
        # Sums over shots in another order, in float32; Adam divides small gradients by their own size.
        torch.testing.assert_close(other[path], scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["plain_loop"])
def test_saving_memory_changes_nothing(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Checkpoints, offloading and both, with accumulation: bit-identical adapters."""
    plain, *others = (
        run(name, tiny_folder, tmp_path / "-".join(flags or ("plain",)), "--accumulate", "2", *flags)
        for flags in ((), ("--checkpointing",), ("--offload",), ("--checkpointing", "--offload"))
    )
    for other in others:
        assert all(torch.equal(other[path], scale) for path, scale in plain.items())


def test_a_compiled_loop_ends_where_the_plain_loop_ends(tiny_folder: Path, tmp_path: Path) -> None:
    """Up to 2 % of a step: AdamW divides by the gradient, which amplifies the rounding of small ones."""
    plain = run("plain_loop", tiny_folder, tmp_path / "plain", "--batch-size", "10")
    try:
        compiled = run("plain_loop", tiny_folder, tmp_path / "again", "--batch-size", "10", "--compile", "eager")
    finally:
        torch.compiler.reset()
    assert all(torch.allclose(compiled[path], scale, rtol=0, atol=2e-5) for path, scale in plain.items())


def test_half_precision_tunes_float32_scales(tiny_folder: Path, tmp_path: Path) -> None:
    """In bfloat16 a scale of 1 would not change by steps of this size."""
    tuned = run("plain_loop", tiny_folder, tmp_path / "adapter", "--dtype", "bfloat16")
    assert all(scale.dtype == torch.float32 for scale in tuned.values())
    assert all(1e-4 < float((scale - 1).abs().max()) < 3e-3 for scale in tuned.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_accumulates_what_a_loop_accumulates(precision: str, tmp_path: Path) -> None:
    """Two batches in a step, with and without autocast: the gradient is that of their mean loss."""
    import lightning

    # On the CPU, where Lightning moves the module after training.
    given = (families.inputs("llama", tokens=tokens, seed=tokens) for tokens in (6, 5))
    rows = [{key: value.cpu() for key, value in one.items()} for one in given]
    module = example("lightning_module").NormTuning(families.build("llama").cpu(), 0.0)
    gradients: list[Tensor] = []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, *rest: gradients.extend(p.grad.clone() for p in optimizer.param_groups[0]["params"])
    )
    lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        accelerator="cpu",
    ).fit(module, DataLoader(rows, batch_size=None))
    handle.remove()
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        losses = [module.model(**batch).loss + module.reg.penalty() for batch in rows]
    torch.stack(losses).mean().backward()
    for scale, gradient in zip(module.params, gradients, strict=True):
        # The same operations; gradients of the two batches are added in another order.
        torch.testing.assert_close(gradient, scale.grad, rtol=1e-4, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-2
