"""`ofa doctor`: show installed versions, devices and kernels, and advice for problems."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from ofa.commands.console import show, show_json, show_table
from ofa.commands.options import JsonOption, command
from ofa.files import Json

_NEEDED = ("torch", "transformers", "peft", "safetensors", "huggingface_hub", "datasets", "gguf", "accelerate")
_OPTIONAL = ("triton",)


@command
def doctor(
    as_json: JsonOption = False,
) -> None:
    """Show versions, devices, which kernels run where, the model cache, and advice where something is missing."""
    document = examine()
    if as_json:
        show_json(document)
    else:
        _show(document)


def examine() -> Json:
    """The findings of `ofa doctor` as JSON values."""
    from ofa._version import __version__
    from ofa.models.embedded import embedded_cache_dir, embedded_is_cached

    versions: dict[str, str | None] = {"ofa-adapt": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
    threads = _threads() if versions["torch"] else {}
    devices = _devices(threads) if threads else []
    document = {
        "versions": versions,
        "devices": devices,
        "threads": threads,
        "kernels": _kernels(devices),
        "cache": {
            "folder": str(embedded_cache_dir()),
            "default_model": embedded_is_cached(),
            "hub_offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""),
        },
    }
    return {**document, "advice": _advice(document)}


def _devices(threads: dict[str, object]) -> list[dict[str, object]]:
    import torch

    found: list[dict[str, object]] = [{"name": "cpu", "remark": _cpu_remark(threads)}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        remark = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found.append({"name": f"cuda:{index}", "remark": remark})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "remark": "Apple GPU"})
    return found


def _threads() -> dict[str, object]:
    """The number of threads that commands would use now, and its reasons."""
    import torch

    from ofa.threads import threads_from_environment, usable_cores

    cores, given = usable_cores(), threads_from_environment()
    return {
        "threads": given or min(cores.free, torch.get_num_threads()),
        "OMP_NUM_THREADS": given,
        "cores": cores.allowed,
        "quota": cores.quota,
        "busy_with_others": round(cores.busy, 2),
    }


def _cpu_remark(threads: dict[str, object]) -> str:
    count = threads["threads"]
    if threads["OMP_NUM_THREADS"] is not None:
        why = "as OMP_NUM_THREADS says"
    else:
        quota = "no quota" if threads["quota"] is None else f"a quota of {threads['quota']:g}"
        why = f"{threads['cores']} cores, {quota}, other processes use {threads['busy_with_others']:.1f} of them"
    return f"{count} {'thread' if count == 1 else 'threads'}: {why}"


def _kernels(devices: list[Json]) -> list[dict[str, str]]:
    """Which implementation of each operation would run on each device."""
    if not devices:
        return []
    import torch

    from ofa_kernels import dispatch

    rows = []
    for device in devices:
        tensor = torch.empty(1, 64, device=device["name"])
        chosen = {operation: dispatch.choose(operation, tensor).name for operation in dispatch.OPERATIONS}
        rows.append({"device": device["name"], **chosen})
    return rows


def _advice(document: Json) -> list[str]:
    advice = []
    missing = [name for name in _NEEDED if document["versions"][name] is None]
    if missing:
        advice.append(f"{', '.join(missing)} is missing: pip install -c constraints.txt -e .")
    if _version("ofa") is not None:
        advice.append(
            "the unrelated package `ofa` is installed and may shadow this one: pip uninstall ofa, then install "
            "ofa-adapt again"
        )
    if not document["cache"]["default_model"]:
        advice.append("the default model is not in the cache yet: `ofa demo` fetches it (90 MB), or give --model")
    if any(device["name"].startswith("cuda") for device in document["devices"]) and not document["versions"]["triton"]:
        advice.append('there is a GPU but no Triton: pip install -c constraints.txt -e ".[cuda]"')
    return advice


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _show(document: Json) -> None:
    rows = [(name, version or "not installed") for name, version in document["versions"].items()]
    rows += [(f"device {device['name']}", device["remark"]) for device in document["devices"]]
    for row in document["kernels"]:
        names = sorted({value for key, value in row.items() if key != "device"})
        rows.append((f"kernels on {row['device']}", ", ".join(names)))
    cached = "in the cache" if document["cache"]["default_model"] else "not fetched yet"
    show_table((), [*rows, ("default model", f"{cached} ({document['cache']['folder']})")])
    for line in document["advice"]:
        show(f"advice: {line}")
    if not document["advice"]:
        show("nothing is missing")
