"""Everything static is in pyproject.toml; this file is where ahead-of-time kernel builds will hook in."""

from setuptools import setup

setup()
