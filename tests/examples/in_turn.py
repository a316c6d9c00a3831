"""Examples one after another in the processes of one launch, whose imports take longer than the examples.

python -m accelerate.commands.launch … in_turn.py NAMES FOLDER OPTION… saves the adapter of each example in FOLDER/NAME.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import distributed

from tests.examples.test_loops import example

join = distributed.init_process_group


def join_once(*given: Any, **options: Any) -> None:
    """Keep one process group: torchrun's store has the first one's addresses when a second one meets."""
    if not distributed.is_initialized():
        join(*given, **options)


if __name__ == "__main__":
    names, folder, *options = sys.argv[1:]
    distributed.init_process_group, distributed.destroy_process_group = join_once, lambda *given: None
    for name in names.split(","):
        example(name).main([*options, "--out", f"{folder}/{name}"])
