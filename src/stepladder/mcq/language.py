"""Is a chain written in the language of its question?"""

from __future__ import annotations

import unicodedata

from stepladder.records import Language

FEWEST = 20
"""Letters below which a text is too short to tell."""
LIMIT = 0.1
"""Share of Chinese characters that a Chinese text has at least, and an English one at most; and of letters of neither
script that either may have. A Chinese proof full of names and formulas still has three times as much."""


def speaks(text: str, language: Language) -> bool:
    """Whether a text is in a language; yes where it is too short to tell."""
    plain = unicodedata.normalize("NFKC", text)  # full-width and mathematical letters are Latin ones
    letters = [unicodedata.name(character, "") for character in plain if character.isalpha()]
    if len(letters) < FEWEST:
        return True
    chinese = sum(name.startswith("CJK") for name in letters) / len(letters)
    latin = sum(name.startswith("LATIN") for name in letters) / len(letters)
    return chinese + latin >= 1 - LIMIT and (chinese >= LIMIT) == (language == "zh")
