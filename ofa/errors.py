"""The exception for bad input, and helpers to quote other errors in its message."""

from __future__ import annotations

_LONGEST = 900
_LINE_ENDS = {ord(character): repr(character)[1:-1] for character in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}


class InputError(ValueError):
    """Input from the user cannot be used.

    The message is one sentence: what is wrong, where, and what to do. The command line prints only the message, without
    a traceback, and exits with a non-zero status. Quoted text may be arbitrary: line ends and lone surrogates are
    escaped, and the middle of a very long message is left out.

    Example:
        >>> try:
        ...     ofa.fused_regularizers(model, sharpness=-1)
        ... except ofa.InputError as error:
        ...     print(error)
        sharpness must be ..., not -1
    """

    def __init__(self, message: str) -> None:
        """Escape and shorten the message to one printable line."""
        line = message.translate(_LINE_ENDS).encode(errors="backslashreplace").decode()
        half = _LONGEST // 2
        super().__init__(line if len(line) <= _LONGEST else f"{line[:half]} … {line[-half:]}")


def refuse_surrogates(text: str, where: str) -> None:
    """Raise `InputError` for lone surrogates, which a JSON escape, or bytes that are not UTF-8, leave in a text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds half of a surrogate pair or bytes that are not UTF-8: write the character itself, in UTF-8"
        ) from error


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's text, without its full stop, for quoting inside another sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".: ") if lines else type(error).__name__


def in_words(error: BaseException) -> str:
    """The message of an `InputError`, or the type and first sentence of any other error."""
    if isinstance(error, InputError):
        return str(error)
    name, sentence = type(error).__name__, first_sentence(error)
    return name if sentence == name else f"{name}: {sentence}"
