"""A row of a batch is answered as if its adapter were alone in the model, whatever the other rows have."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import ofa
from ofa.adapters import same_base
from ofa.errors import InputError
from tests.families import BUILDERS, build, inputs

NAMES = ["a", "b", "a", "c"]


@pytest.fixture(autouse=True, scope="module")
def _no_gradients():
    with torch.no_grad():
        yield


def base(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return build(name).to(dtype)


def adapters(model: nn.Module, folder: Path) -> dict[str, Path]:
    """Three adapters of a model, which is left as it was."""
    made = {}
    for number, name in enumerate(dict.fromkeys(NAMES)):
        for scale in ofa.tune_norms(model):
            scale.add_(torch.linspace(-0.3, 0.3, scale.numel(), device=scale.device) * (number + 1))
        made[name] = ofa.save_adapter(model, folder / name, base_model="base")
        ofa.restore_norms(model)
    return made


def batch(name: str, rows: int = 4) -> dict[str, torch.Tensor]:
    given = inputs(name, sequences=rows)
    given.pop("labels")
    return given


def alone(model: nn.Module, folders: dict[str, Path], given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Row i of the same batch, with the adapter `NAMES[i]` in the model."""
    rows = []
    for row, name in enumerate(NAMES):
        ofa.load_adapter(model, folders[name])
        rows.append(model(**given).logits[row])
        ofa.restore_norms(model)
    return torch.stack(rows)


def pool_of(model: nn.Module, folders: dict[str, Path]) -> ofa.AdapterPool:
    pool = ofa.AdapterPool(model)
    for name, folder in folders.items():
        pool.add(name, folder)
    return pool


# Every family in bfloat16, where a scale is wider than the rows.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in BUILDERS), *((name, torch.float32) for name in ("qwen3", "gpt2", "gemma2"))],
    ids=str,
)
def test_each_row_is_what_its_adapter_alone_answers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = base(name, dtype)
    given = batch(name)
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
    folders, before = adapters(model, tmp_path), model(**given).logits
    expected = alone(model, folders, given)
    with pool_of(model, folders) as pool:
        with pool.rows(NAMES):
            found = model(**given).logits
        torch.testing.assert_close(model(**given).logits, before, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (found - before).abs().flatten(1).amax(1).min() > 0.01
    torch.testing.assert_close(model(**given).logits, before, rtol=0, atol=0)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_base_is_read_once_for_all_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it takes longer than reading an adapter, and a pool holds hundreds."""
    model = base("llama")
    folders = adapters(model, tmp_path)
    reads: list[nn.Module] = []
    fingerprints = same_base.fingerprints
    monkeypatch.setattr(same_base, "fingerprints", lambda model: reads.append(model) or fingerprints(model))
    with pool_of(model, folders):
        assert len(reads) == 1


def test_completions_of_several_adapters_are_generated_together(tmp_path: Path) -> None:
    model, given = base("llama"), batch("llama")
    folders = adapters(model, tmp_path)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = []
    for row, name in enumerate(NAMES):
        ofa.load_adapter(model, folders[name])
        expected.append(model.generate(**given, **settings)[row])
        ofa.restore_norms(model)
    with pool_of(model, folders) as pool, pool.rows(NAMES):
        found = model.generate(**given, **settings)
    torch.testing.assert_close(found, torch.stack(expected))


def test_threads_have_rows_of_their_own(tmp_path: Path) -> None:
    model, given = base("qwen3"), batch("qwen3", rows=1)
    folders = adapters(model, tmp_path)
    with pool_of(model, folders) as pool:

        def answer(name: str) -> torch.Tensor:
            with pool.rows([name]):
                return model(**given).logits

        expected = {name: answer(name) for name in folders}
        with ThreadPoolExecutor(3) as threads, torch.no_grad():
            found = list(threads.map(answer, NAMES * 5))
    for name, logits in zip(NAMES * 5, found, strict=True):
        assert torch.equal(logits, expected[name])


def test_rows_keep_an_adapter_that_is_removed_or_replaced(tmp_path: Path) -> None:
    model, given = base("llama"), batch("llama", rows=1)
    folders = adapters(model, tmp_path)
    with pool_of(model, folders) as pool, pool.rows(["a"]):
        before = model(**given).logits
        pool.add("a", folders["b"])
        assert torch.equal(model(**given).logits, before)
        with pool.rows(["a"]):
            assert not torch.equal(model(**given).logits, before)
        pool.remove("a")
        assert pool.names == ("b", "c")
        assert torch.equal(model(**given).logits, before)


def choose(names):
    def wrong(pool: ofa.AdapterPool, folders: dict[str, Path]) -> None:
        with pool.rows(names):
            pool.model(**batch("llama"))

    return wrong


REFUSED = {
    "an unknown adapter": (choose(["a", "x"]), "no adapter 'x' in the pool; it holds a, b, c"),
    "an unknown one removed": (lambda pool, folders: pool.remove("x"), "no adapter 'x'"),
    "too few names": (choose(["a", "b"]), "has 4 rows and 2 adapters were named"),
    "no names": (choose([]), "no adapter was named"),
    "another base": (lambda pool, folders: pool.add("d", folders["other"]), "own norms differ"),
    "no adapter": (lambda pool, folders: pool.add("d", folders["a"].parent / "nowhere"), "is not an adapter folder"),
    "a second pool": (lambda pool, folders: ofa.AdapterPool(pool.model), "is in a pool already"),
}


@pytest.mark.parametrize(("use", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_use_is_refused_in_a_sentence(use, words: str, tmp_path: Path) -> None:
    model = base("llama")
    folders = adapters(model, tmp_path)
    other = build("llama", seed=1)
    ofa.tune_norms(other)
    with pool_of(model, folders) as pool:
        with pytest.raises(InputError) as refusal:
            use(pool, folders | {"other": ofa.save_adapter(other, tmp_path / "other", base_model="other")})
        assert words in str(refusal.value)
        assert pool.names == ("a", "b", "c")


def test_a_copy_of_a_model_in_a_pool_is_no_silent_mixture(tmp_path: Path) -> None:
    model = base("llama")
    with pool_of(model, adapters(model, tmp_path)), pytest.raises(TypeError, match="ContextVar"):
        copy.deepcopy(model)
