"""The one exception a user is meant to read."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that says what was wrong, where, and what to do about it. The command line prints it
    alone, without a traceback, and exits with a non-zero status.
    """
