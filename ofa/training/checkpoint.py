"""The checkpoint of a training run, one safetensors file: scales, AdamW moments, position. Written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ofa.errors import InputError
from ofa.files import Json, write_atomically

_LAYOUT = "1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps; tensors by parameter name. `run` identifies configuration, data and model.

    `moments` is empty before the first step. `best` is (epoch, validation score, scales), None without validation.
    `held` is the last measured sharpness and its gradient, None if every step measures it.
    """

    step: int
    passes: int
    seconds: float
    run: Json
    scales: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    best: tuple[int, float, dict[str, Tensor]] | None = None
    held: tuple[float, dict[str, Tensor]] | None = None


def save(path: Path, state: Checkpoint) -> None:
    """Write the checkpoint atomically: an interrupted write leaves the old one in place."""
    from safetensors.torch import save_file

    tensors = {f"scale/{name}": value for name, value in state.scales.items()}
    for moment, values in state.moments.items():
        tensors |= {f"{moment}/{name}": value for name, value in values.items()}
    facts: dict[str, object] = {"step": state.step, "passes": state.passes, "seconds": state.seconds, "run": state.run}
    if state.best is not None:
        facts["best"] = state.best[:2]
        tensors |= {f"best/{name}": value for name, value in state.best[2].items()}
    if state.held is not None:
        facts["held"] = state.held[0]
        tensors |= {f"held/{name}": value for name, value in state.held[1].items()}
    own = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    metadata = {"layout": _LAYOUT, "state": json.dumps(facts)}
    write_atomically(path, lambda temporary: save_file(own, temporary, metadata=metadata))


def load(path: Path, run: Mapping[str, object], scales: Mapping[str, Tensor]) -> Checkpoint:
    """Read a checkpoint and check that it belongs to `run`, the run that continues from it.

    Raises:
        InputError: it is missing, damaged, or of another configuration, data set or model.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"there is no checkpoint {path} to resume from; leave out --resume to start over")
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        step, passes, seconds, saved = (facts[name] for name in ("step", "passes", "seconds", "run"))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the checkpoint {path} is damaged ({error}); start over with --overwrite") from error
    _check_same_run(path, saved, json.loads(json.dumps(run)))
    groups = _grouped(tensors)
    shapes = {name: value.shape for name, value in groups.get("scale", {}).items()}
    if saved.get("model") != run["model"] or shapes != {name: scale.shape for name, scale in scales.items()}:
        raise InputError(f"the checkpoint {path} is of another model; resume with the model it was made with")
    best = (*facts["best"], groups["best"]) if "best" in facts else None
    moments = {name: groups[name] for name in _MOMENTS if name in groups}
    held = (facts["held"], groups.get("held", {})) if "held" in facts else None
    return Checkpoint(step, passes, seconds, saved, groups["scale"], moments, best, held)


def recorded_threads(path: Path) -> int | None:
    """The number of threads that a checkpoint's run computed with; None if the file cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return int(json.loads(file.metadata()["state"])["run"]["threads"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def moments(optimizer: torch.optim.AdamW, scales: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """AdamW's running averages by parameter name; empty before the first step."""
    if not optimizer.state:
        return {}
    return {moment: {name: optimizer.state[scale][moment] for name, scale in scales.items()} for moment in _MOMENTS}


def restore_moments(optimizer: torch.optim.AdamW, scales: Mapping[str, nn.Parameter], state: Checkpoint) -> None:
    """Restore AdamW's running averages and step count."""
    if not state.moments:
        return
    for name, scale in scales.items():
        own = {moment: state.moments[moment][name].to(scale.device) for moment in _MOMENTS}
        optimizer.state[scale] = {"step": torch.tensor(float(state.step)), **own}


def digest(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_digest(model: nn.Module) -> str:
    """SHA-256 of name, dtype, shape and first values of every frozen weight.

    The values distinguish models of the same shapes, such as a base model and its instruction-tuned version.
    """
    frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    return digest([[name, str(value.dtype), list(value.shape), _first_values(value)] for name, value in frozen.items()])


def _first_values(tensor: Tensor, count: int = 16) -> list[float]:
    if tensor.is_meta:  # offloaded: no values here
        return []
    return tensor.detach().flatten()[:count].float().tolist()


def _check_same_run(path: Path, saved: Json, wanted: Json) -> None:
    changed = [name for name in wanted["config"] if saved["config"].get(name) != wanted["config"][name]]
    if changed:
        name = changed[0]
        before, now = saved["config"].get(name), wanted["config"][name]
        raise InputError(
            f"the checkpoint {path} was made with {name}={before!r}, not {now!r}; "
            "resume with the same settings or start over with --overwrite"
        )
    if saved["data"] != wanted["data"]:
        raise InputError(
            f"the checkpoint {path} was made with other training examples; resume with the same data, shots and "
            "seed or start over with --overwrite"
        )
    made = saved.get("schedule", "the defaults of an earlier version")
    if made != wanted["schedule"]:
        raise InputError(
            f"the checkpoint {path} was made with {made}, not {wanted['schedule']}: the defaults have changed since; "
            "start over with --overwrite"
        )


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = value
    return groups
