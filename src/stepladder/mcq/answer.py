"""From a model's text to a letter, and the rule that found it.

Strict: the last line is the answer line and nothing else; only strict answers may train a student.
Lenient: the strict rule, then common phrasings in the text's last lines; reported beside strict, never trained on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from stepladder.records import LETTERS


class Extracted(NamedTuple):
    """A letter (None: nothing found) and the rule that fired."""

    letter: str | None
    rule: str


_STRICT = re.compile(r"(?:Answer: |答案是：)([A-Z])")
_LENIENT = (
    ("phrase", re.compile(r"(?:answer(?: is)?|答案(?:是|为)?)\s*[:：]?\s*[*（(\[]*([A-Z])(?![A-Za-z])", re.IGNORECASE)),
    ("option", re.compile(r"(?:option|选项?)\s*[*（(\[]*([A-Z])(?![A-Za-z])", re.IGNORECASE)),
    ("bare", re.compile(r"^[\s*（(\[]*([A-Z])[\s*）)\].。:]*$", re.MULTILINE)),
)


def strict(text: str, options: int) -> Extracted:
    """The letter on the last line, which must be exactly ``Answer: X`` or ``答案是：X`` with X among the options."""
    last = text.rstrip().rpartition("\n")[2].strip()
    match = _STRICT.fullmatch(last)
    if match and match[1] in LETTERS[:options]:
        return Extracted(match[1], "last-line")
    return Extracted(None, "none")


def lenient(text: str, options: int) -> Extracted:
    """The strict letter, else the last letter that a common phrasing names."""
    found = strict(text, options)
    if found.letter is not None:
        return found
    for rule, pattern in _LENIENT:
        letters = [letter.upper() for letter in pattern.findall(text) if letter.upper() in LETTERS[:options]]
        if letters:
            return Extracted(letters[-1], rule)
    return Extracted(None, "none")


def leading(votes: Iterable[str | None]) -> str | None:
    """The letter with more votes than any other; None on a tie or where nothing could be read."""
    ranked = Counter(vote for vote in votes if vote is not None).most_common(2)
    return ranked[0][0] if ranked and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]) else None


def majority(votes: tuple[str | None, ...]) -> str | None:
    """The most frequent letter; ties go to the one voted first; None where nothing could be read."""
    letters = [vote for vote in votes if vote is not None]
    return max(letters, key=lambda letter: (letters.count(letter), -letters.index(letter))) if letters else None
