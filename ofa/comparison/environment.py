"""Describe the environment of a result: versions of libraries, the device, the time."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING

from ofa.models.types import CausalLM

if TYPE_CHECKING:
    import torch


def library_versions() -> dict[str, str]:
    """Versions of this package, Python and the numerical libraries."""
    from ofa.adapters.write import versions as packages  # it imports torch, which a worker must not do first

    return packages() | {"python": platform.python_version(), "numpy": metadata.version("numpy")}


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(model: CausalLM) -> dict[str, str]:
    """`library_versions`, and the model's device names, its dtype, and the number of CPU threads."""
    import torch

    devices = sorted({parameter.device for parameter in model.parameters()}, key=str)
    return library_versions() | {
        "device": ", ".join(dict.fromkeys(map(_name, devices))),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
    }


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)
