"""Templates: text with the names of columns in braces, and how it is typed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_PART = re.compile(r"\{\{|\}\}|\{([^{}\n]*[^{}\s][^{}\n]*)\}")
_ESCAPE = re.compile(r"\\([nt\\])")
_ESCAPED = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class Template:
    """A template in parts: `literals[0]`, the column `slots[0]`, `literals[1]`, … and a last literal."""

    literals: tuple[str, ...]
    slots: tuple[str, ...]

    @classmethod
    def parse(cls, written: str) -> Template:
        """The parts of a template: {name} is a column, {{ and }} are braces; a brace without a partner is itself."""
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
        """What stands before the first column."""
        return self.literals[0]

    @property
    def tail(self) -> str:
        """What stands after the last column."""
        return self.literals[-1]

    def joined(self, values: Sequence[str]) -> str:
        """The columns' values with what stands between them: the text of a row, without head and tail."""
        between = [*self.literals[1:-1], ""]
        return "".join(part for pair in zip(values, between, strict=True) for part in pair)


def unescape_template(written: str) -> str:
    r"""A template as a shell hands it over: \n is a line break, \t a tab, and \\n the two characters \n."""
    return _ESCAPE.sub(lambda escape: _ESCAPED[escape[1]], written)
