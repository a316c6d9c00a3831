"""Parse templates: text with names of columns in braces, and escapes typed in a shell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_PART = re.compile(r"\{\{|\}\}|\{([^{}\n]*[^{}\s][^{}\n]*)\}")
_ESCAPE = re.compile(r"\\([nt\\])")
_ESCAPED = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class Template:
    """A parsed template: `literals[0]`, the column `slots[0]`, `literals[1]`, … and a last literal."""

    literals: tuple[str, ...]
    slots: tuple[str, ...]

    @classmethod
    def parse(cls, written: str) -> Template:
        """Parse a template: {name} is a column, {{ and }} are braces, and an unpaired brace is literal."""
        literals, slots, end = [""], [], 0
        for part in _PART.finditer(written):
            literals[-1] += written[end : part.start()]
            end = part.end()
            if part[1] is None:
                literals[-1] += part[0][0]
            else:
                slots.append(part[1].strip())
                literals.append("")
        literals[-1] += written[end:]
        return cls(tuple(literals), tuple(slots))

    @property
    def head(self) -> str:
        """The literal before the first column."""
        return self.literals[0]

    @property
    def tail(self) -> str:
        """The literal after the last column."""
        return self.literals[-1]

    def joined(self, values: Sequence[str]) -> str:
        """The text of a row: the columns' values joined by the literals between them, without head and tail."""
        between = [*self.literals[1:-1], ""]
        return "".join(part for pair in zip(values, between, strict=True) for part in pair)


def unescape_template(written: str) -> str:
    r"""Undo escapes typed in a shell: \n is a line break, \t a tab, and \\n the two characters \n."""
    return _ESCAPE.sub(lambda escape: _ESCAPED[escape[1]], written)
