"""Check that a chain is written in the language of its question."""

from __future__ import annotations

import unicodedata

from stepladder.records import Language
from stepladder.text import nfkc

MIN_LETTERS = 20
"""Texts with fewer letters are too short to tell."""
SCRIPT_SHARE = 0.1
"""Share of a text's letters: a Chinese text has at least this share of Chinese characters, an English one less; letters
of other scripts may make up this share of either. Chinese proofs full of names and formulas have 0.3 Chinese."""


def is_written_in(text: str, language: Language) -> bool:
    """Whether a text is written in a language; True where it is too short to tell."""
    plain = nfkc(text)  # full-width and mathematical letters are Latin ones
    letters = [unicodedata.name(character, "") for character in plain if character.isalpha()]
    if len(letters) < MIN_LETTERS:
        return True
    chinese = sum(name.startswith("CJK") for name in letters) / len(letters)
    latin = sum(name.startswith("LATIN") for name in letters) / len(letters)
    return chinese + latin >= 1 - SCRIPT_SHARE and (chinese >= SCRIPT_SHARE) == (language == "zh")
