"""The one exception a user is meant to read."""

from __future__ import annotations

_LONGEST = 900
_LINE_ENDS = {ord(character): repr(character)[1:-1] for character in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that says what was wrong, where, and what to do about it. The command line prints it
    alone, without a traceback, and exits with a non-zero status. What is quoted in it may be anything: line ends and
    halves of surrogate pairs are written as escapes, and the middle of a very long message is left out.

    Example:
        >>> try:
        ...     ofa.fused_regularizers(model, sharpness=-1)
        ... except ofa.InputError as error:
        ...     print(error)
        sharpness must be ..., not -1
    """

    def __init__(self, message: str) -> None:
        """Make a line of the message that can be printed."""
        line = message.translate(_LINE_ENDS).encode(errors="backslashreplace").decode()
        half = _LONGEST // 2
        super().__init__(line if len(line) <= _LONGEST else f"{line[:half]} … {line[-half:]}")


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's text, without its full stop, to be quoted inside another sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".: ") if lines else type(error).__name__


def in_words(error: BaseException) -> str:
    """The message of an `InputError` as it is; of any other error its type and its first sentence, if it has one."""
    if isinstance(error, InputError):
        return str(error)
    name, sentence = type(error).__name__, first_sentence(error)
    return name if sentence == name else f"{name}: {sentence}"
