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
    """Resources of one compiled kernel; `wide`, `narrow` and `float64` count instructions.

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
    """Read a kernel that Triton has compiled, by its stages `asm` and its `metadata`.

    Raises:
        RuntimeError: cuobjdump, which comes with Triton, failed.
    """
    return _of_cubin(compiled) if "cubin" in compiled.asm else _of_amdgcn(compiled)


def _of_cubin(compiled: Any) -> Usage:
    """Registers and stack from the binary, instructions from the PTX.

    The assembler keeps the width of every access and adds no float64; disassembling takes as long as compiling.
    """
    resources = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", cuobjdump(compiled.asm["cubin"], "-res-usage")))
    code = compiled.asm["ptx"]
    accesses = re.findall(r"\b(?:ld|st)\.global\S*", code)
    wide = [access for access in accesses if re.search(r"\.v4\.\w32|\.v2\.\w64", access)]
    return Usage(
        registers=int(resources["REG"]),
        spills=int(resources["STACK"]) + int(resources["LOCAL"]),
        shared=compiled.metadata.shared,
        wide=len(wide),
        narrow=len(accesses) - len(wide),
        float64=len(re.findall(r"\.f64\b", code)),
    )


def cuobjdump(cubin: bytes, *options: str) -> str:
    """What NVIDIA's tool prints of a binary.

    Raises:
        RuntimeError: the tool, which comes with Triton, failed.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, *options, str(file)]
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
