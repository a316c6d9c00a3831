"""Configure logging for the command line: our own messages as plain lines, other libraries' off."""

from __future__ import annotations

import logging
import os
import sys


def quiet_libraries() -> None:
    """Log our own warnings as plain lines on standard error; silence other libraries' progress bars and advice."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # such as that of the tensors of a GGUF file
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of missing CPU kernels on import
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("ofa: %(message)s"))
    logger = logging.getLogger("ofa")
    logger.handlers = [handler]
    logger.propagate = False
