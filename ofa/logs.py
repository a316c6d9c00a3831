"""Log messages on the command line: our own as plain lines, other libraries' off."""

from __future__ import annotations

import logging
import os
import sys


def quiet_libraries() -> None:
    """Our own warnings as plain lines on standard error; other libraries' bars and advice off."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels for a CPU wherever it is imported
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("ofa: %(message)s"))
    logger = logging.getLogger("ofa")
    logger.handlers = [handler]
    logger.propagate = False
