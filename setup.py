"""Everything static is in pyproject.toml; this file adds compiled kernels to a wheel if it is asked to.

`OFA_BUILD_ARCHS="sm_90 gfx942" pip install .` compiles them for these GPUs, with the PyTorch and Triton of the
environment it installs into. Without the variable the wheel is pure Python, and kernels are compiled at first use.
`OFA_BUILD_OPTIONS` holds more options of `python -m ofa_kernels.aot`, to compile for fewer widths or dtypes.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithKernels(build_py):
    """Copies the packages, then compiles the kernels into the copy."""

    def run(self) -> None:
        """Build."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, "ofa_kernels", "binaries")
        # A build folder outlives its build, and what an earlier one left there would go into this wheel.
        shutil.rmtree(folder, ignore_errors=True)
        architectures = os.environ.get("OFA_BUILD_ARCHS", "").split()
        if architectures:
            compile_kernels(architectures, folder)


def compile_kernels(architectures: list[str], folder: Path) -> None:
    """Compile for the architectures, in a process of the environment around an isolated build.

    What is compiled serves one version of Triton only: the one that will run it. An isolated build has none of its
    own, but its interpreter finds the installed one as soon as nothing hides it.
    """
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-m", "ofa_kernels.aot", "--out", str(folder.absolute())]
    command += [word for architecture in architectures for word in ("--arch", architecture)]
    command += shlex.split(os.environ.get("OFA_BUILD_OPTIONS", ""))
    found = subprocess.run([sys.executable, "-c", "import torch, triton"], env=environment, capture_output=True)
    if found.returncode:
        raise SystemExit(
            "OFA_BUILD_ARCHS asks for compiled kernels, which needs PyTorch and Triton in the environment that is "
            "installed into: install torch and triton there first, or unset it"
        )
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise SystemExit(f"the kernels could not be compiled for {' '.join(architectures)}; the reason stands above")


setup(cmdclass={"build_py": BuildWithKernels})
