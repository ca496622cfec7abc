"""Words and punctuation of the text form, with their places."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ir.errors import ParseError

WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
"""Names that need no quotes."""

_TOKEN: Final = re.compile(
    r"""(?P<blank>\s+|\#[^\n]*)
      | (?P<value>%[0-9]+(?:\.[0-9]+)?)
      | (?P<base64>base64"[A-Za-z0-9+/=]*")
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<number>-inf|-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)
      | (?P<word>[A-Za-z_][A-Za-z0-9_.\-]*)
      | (?P<mark>[{}()\[\]=:,@])""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Token:
    """A piece of text.

    Attributes:
        kind: value, base64, string, number, word, mark or end.
        text: As written.
        offset: Where it begins.
    """

    kind: str
    text: str
    offset: int

    def __str__(self) -> str:
        return "the end of the text" if self.kind == "end" else f"'{self.text[:60]}'"


def tokens(text: str, source: str) -> list[Token]:
    """Split a text; the last token has the kind `end`.

    Raises:
        ParseError: A character that begins no token.
    """
    found: list[Token] = []
    offset = 0
    while offset < len(text):
        match = _TOKEN.match(text, offset)
        if match is None:
            raise ParseError("unexpected character", where=place(text, offset, source), found=repr(text[offset]))
        if match.lastgroup is not None and match.lastgroup != "blank":
            found.append(Token(match.lastgroup, match.group(), offset))
        offset = match.end()
    return [*found, Token("end", "", len(text))]


def place(text: str, offset: int, source: str) -> str:
    """`source:line:column`, both counted from 1."""
    line = text.count("\n", 0, offset) + 1
    return f"{source}:{line}:{offset - text.rfind(chr(10), 0, offset)}"
