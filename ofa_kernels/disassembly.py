"""Resources of a compiled kernel: registers, spills, shared memory, width of memory accesses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Resources of one compiled kernel; `wide`, `narrow` and `float64` count machine instructions.

    Attributes:
        registers: per thread.
        spills: bytes per thread of spilled registers: stack and local memory, or AMD's scratch.
        shared: bytes of shared memory per program.
        wide: loads and stores of 16 bytes per thread in device memory.
        narrow: all other loads and stores in device memory, such as scalars per row.
        float64: instructions that compute in float64.
    """

    registers: int
    spills: int
    shared: int
    wide: int
    narrow: int
    float64: int


def usage(compiled: Any) -> Usage:
    """Read a kernel that Triton has compiled.

    Raises:
        RuntimeError: the disassembler that comes with Triton failed.
    """
    return _of_cubin(compiled) if "cubin" in compiled.asm else _of_amdgcn(compiled)


def _of_cubin(compiled: Any) -> Usage:
    text = disassemble(compiled.asm["cubin"])
    resources = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text))
    code = re.sub(r"/\*.*?\*/", "", text)
    accesses = re.findall(r"\b(?:LDG|STG)\.[\w.]+", code)
    # Hopper's copies into shared memory, which bypass registers, move 16 bytes as well.
    wide = [access for access in accesses if ".128" in access]
    local = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Usage(
        registers=int(resources["REG"]),
        spills=int(resources["STACK"]) + int(resources["LOCAL"]) + 4 * local,
        shared=compiled.metadata.shared,
        wide=len(wide),
        narrow=len(accesses) - len(wide),
        float64=len(re.findall(r"\b(?:DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.\w*64H?|[FI]2[FI][\w.]*F64)\b", code)),
    )


def disassemble(cubin: bytes) -> str:
    """NVIDIA's listing of a binary: its resources, and every instruction with its address.

    Raises:
        RuntimeError: the disassembler that comes with Triton failed.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(file)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"cuobjdump could not read a kernel: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout + result.stderr


def _of_amdgcn(compiled: Any) -> Usage:
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", code, re.M)
        return int(found[1]) if found else 0

    accesses = re.findall(r"\b(?:global|buffer|flat)_(?:load|store)_\w+", code)
    wide = [access for access in accesses if access.endswith("dwordx4")]
    return Usage(
        registers=number("vgpr_count"),
        spills=number("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        wide=len(wide),
        narrow=len(accesses) - len(wide),
        float64=len(re.findall(r"\bv_\w+_f64", code)),
    )
