"""Rules for the kernels' source code, checked by its syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

from ofa_kernels import launch

KERNELS = sorted(Path(launch.__file__).parent.glob("kernels/*.py"))


def dotted(node):
    return ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""


def calls(file):
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]


def test_program_ids_are_widened():
    """A program id times a row stride exceeds 2³¹ at 500,000 tokens × 4,096 columns."""
    for file in KERNELS:
        found = calls(file)
        widened = [
            call.func.value
            for call in found
            if isinstance(call.func, ast.Attribute) and call.func.attr == "to" and dotted(call.args[0]) == "tl.int64"
        ]
        assert [call for call in found if dotted(call.func) == "tl.program_id" and call not in widened] == [], file.stem


def test_strides_of_samples_are_widened():
    """A sample's index has 32 bits, and N · rows · width exceeds 2³¹ at 65,536 tokens × 8,192 columns × 4."""
    nodes = (node for file in KERNELS for node in ast.walk(ast.parse(file.read_text())))
    for function in (node for node in nodes if isinstance(node, ast.FunctionDef)):
        entry = any("do_not_specialize" in ast.unparse(decorator) for decorator in function.decorator_list)
        if entry and "stride_sample" in [argument.arg for argument in function.args.args]:
            assert "stride_sample = tl.cast(stride_sample, tl.int64)" in ast.unparse(function), function.name


def test_the_rule_about_program_ids_finds_something():
    assert sum(dotted(call.func) == "tl.program_id" for file in KERNELS for call in calls(file)) >= 8


def test_no_vendor_library_inline_assembly_or_atomics():
    """The interpreter has no vendor library or assembly, and the order of atomics differs from run to run."""
    used = {dotted(call.func) for file in KERNELS for call in calls(file)}
    assert not [name for name in used if "libdevice" in name or "inline_asm" in name or "atomic" in name]


def test_every_load_is_widened_at_once():
    """Rows are loaded by `load`, which upcasts; only float32 scalars per row use `tl.load`."""
    for call in (call for file in KERNELS if file.stem != "tile" for call in calls(file)):
        if dotted(call.func) == "tl.load":
            assert not [keyword for keyword in call.keywords if keyword.arg == "mask"], ast.unparse(call)
