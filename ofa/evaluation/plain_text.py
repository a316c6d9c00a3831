"""Tokenize a template around a text: control tokens take effect in the template, and are plain text in the text."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from itertools import pairwise

from ofa.errors import InputError
from ofa.models.types import Tokenizer

logger = logging.getLogger(__name__)


class PlainText:
    """A tokenizer that never reads a control token, such as `<s>` or `<|im_end|>`, in a user's text.

    Control tokens are the special tokens, and the other added tokens that the chat template names. Tokens of one
    character or of blanks are none, since they are what the text says.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._controls = _control_tokens(tokenizer)

    def ids(self, *pieces: str) -> list[int]:
        """Token ids of the joined pieces, without special tokens around them.

        The pieces are a literal of the template, a user's text, a literal, a text, and so on.

        Raises:
            InputError: the tokenizer cannot read a text as text.
        """
        whole = self._whole("".join(pieces))
        read = self._read(whole)
        wanted = [token for literal in pieces[::2] for token in self._read(self._whole(literal))] if read else []
        if read == wanted:
            return whole
        first, *others = self._cut(pieces)
        cut = self._whole(first) + [token for part in others for token in self._after_a_line(part)]
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        if [token for token in self._read(cut) if token != unknown] != [token for token in wanted if token != unknown]:
            raise InputError(
                f"this tokenizer reads a control token in {''.join(pieces[1::2])[:80]!r}: take it out of the text"
            )
        return cut

    def continued(self, *pieces: str) -> list[int]:
        """Token ids of the pieces as they follow a line end."""
        return self._without_line_end(self.ids("\n" + pieces[0], *pieces[1:]), "".join(pieces))

    def controls_in(self, text: str) -> list[str]:
        """The control tokens that the tokenizer reads in a text."""
        return [self._controls[token] for token in self._read(self._whole(text))]

    def _whole(self, text: str) -> list[int]:
        # verbose=False: longer texts than the window are cut later, so the tokenizer's warning would mislead.
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _read(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._controls]

    def _cut(self, pieces: Sequence[str]) -> list[str]:
        """The joined pieces, cut after the first character of every control token that reaches into a text."""
        whole, texts, end = "".join(pieces), [], 0
        for index, piece in enumerate(pieces):
            start, end = end, end + len(piece)
            if index % 2:
                texts.append((start, end))
        found = [(match.start(), match[1]) for match in self._pattern.finditer(whole)]
        inside = [
            (start, token)
            for start, token in found
            if any(start < after and start + len(token) > before for before, after in texts)
        ]
        for _, token in inside:
            _tell(token)
        cuts = [0, *(start + 1 for start, _ in inside), len(whole)]
        return [whole[start:stop] for start, stop in pairwise(cuts)]

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(map(re.escape, self._controls.values()), key=len, reverse=True)
        # Looking ahead finds tokens that overlap; some tokenizers change the case.
        return re.compile(f"(?=({'|'.join(longest_first)}))", re.IGNORECASE)

    def _after_a_line(self, text: str) -> list[int]:
        return self._without_line_end(self._whole("\n" + text), text)

    def _without_line_end(self, ids: list[int], text: str) -> list[int]:
        # SentencePiece adds a space before the first word of a text, but none follows a line end.
        line_end = self._whole("\n")
        return ids[len(line_end) :] if ids[: len(line_end)] == line_end else self._whole(text)


@functools.cache
def _tell(token: str) -> None:
    logger.warning("a text holds %r, a control token of this model: it is read as text", token)


def _control_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    chat = str(getattr(tokenizer, "chat_template", None) or "")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = set(getattr(tokenizer, "all_special_ids", ()))  # not every one of them is marked as special
    return {
        number: token.content
        for number, token in added.items()
        if len(token.content) > 1
        and not token.content.isspace()
        and (token.special or number in named or token.content in chat)
    }
