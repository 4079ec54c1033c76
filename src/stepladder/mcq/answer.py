"""From a model's text to a letter, and the rule that found it.

Strict: the text ends in an answer line that names one letter; only strict answers may train a student.
Lenient: the strict rule, then common phrasings anywhere in the text; reported beside strict, never trained on.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stepladder.records import LETTERS, Language

ANSWER_LINE: dict[Language, str] = {"en": "Answer: {}", "zh": "答案是：{}"}
"""The last line that the prompts ask for."""


class Extracted(NamedTuple):
    """A letter (None: nothing found) and the rule that fired."""

    letter: str | None
    rule: str


# All patterns read text as _plain leaves it: full-width signs as ASCII, no emphasis, no quotes.
_MARKUP = re.compile(r"</?[A-Za-z_]{1,20}>|<\|\w{1,20}\|>|^\s*```\w*|```\s*$|^\s*-{3,}\s*$", re.MULTILINE)
_CLAUSE = re.compile(r"[。！!?;.]\s*|,\s*(?=因此|所以|因而|故|(?:therefore|thus|so|hence)\b)", re.IGNORECASE)
_LEAD = (
    r"(?:(?:assistant|助手)\s*:\s*)?"
    r"(?:(?:综上(?:所述)?|因此|因而|所以|由此(?:可见|可知)?|那么|于是|最终|最后|结论|可见|从而|总之|故|输出(?:为|是)?|答案是|"
    r"(?:根据|基于|综合)[^,。;]{1,40}|(?:based on|according to|given) [^,.;]{1,60}|"
    r"therefore|thus|so|hence|finally|consequently|in (?:conclusion|summary))\s*[,:]?\s*){0,3}"
)
_NAMING = (
    r"(?:(?:正确|正確|最终|最后|最佳|唯一|本题|这道题|该题|此题|题目|问题|的)*(?:答案|选项|回答)(?:应该|应当|应)?\s*[是為为选選:]+"
    r"|(?:应该|应当|应)?选(?:择|项)?(?:的是|是|:)?"
    r"|(?:the |my |our )?(?:(?:final|correct|right|best|only) )*(?:answer|option|choice)(?: is\s*:?|\s*:))"
)
_ANSWER = re.compile(
    rf"[\s#>•-]*(?i:{_LEAD}{_NAMING}\s*(?:选项|答案|option |choice )?)"
    r"\s*[(\[]?\s*([A-Z])(?![A-Za-z\d])\s*[)\]]?(?:选?项)?(.*)"
)
_BOX = re.compile(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}")
_LENIENT = (
    ("phrase", re.compile(r"(?i:answer(?: is)?|答案(?:是|为|選|选)?)\s*:?\s*[(\[]?([A-Z])(?![A-Za-z])")),
    ("phrase", re.compile(r"(?i:answer(?: is)?)\s*:\s*[(\[]?([a-z])[)\].]*$", re.MULTILINE)),
    ("option", re.compile(r"(?i:option|选项?|choice)\s*[(\[]?([A-Z])(?![A-Za-z])")),
    ("bare", re.compile(r"^\s*[(\[]?([A-Z])[)\]]?[.。:]?\s*$", re.MULTILINE)),
)


def strict(text: str, options: Sequence[str]) -> Extracted:
    """The letter of the answer line that a text ends with.

    The line is ``Answer: X`` or ``答案是：X`` as the prompts ask for, or says the same in the words models use: a
    conclusion ("因此", "Therefore") may lead, emphasis or brackets may stand around the letter, closing tags after it.
    Behind the letter the option's own text may follow and nothing else: two letters, a doubt, a reason or another
    option's text leave no letter at all.

    Args:
        text: what the model wrote.
        options: the options' texts in the order it was shown them.
    """
    line = (_segments(text) or [""])[-1]
    named = {}
    for begin in (0, *(found.end() for found in _CLAUSE.finditer(line))):
        match = _ANSWER.fullmatch(line, begin)
        if match and match[1] in LETTERS[: len(options)] and _says(match[2], options[LETTERS.index(match[1])]):
            named[match[1]] = "last-line" if begin == 0 else "last-clause"
    if len(named) != 1 or {*named} != {*named, *_LENIENT[0][1].findall(line)}:
        return Extracted(None, "none")
    return Extracted(*named.popitem())


def lenient(text: str, options: Sequence[str]) -> Extracted:
    """The strict letter, else the last letter that a common phrasing names."""
    found = strict(text, options)
    if found.letter is not None:
        return found
    plain = _plain(text)
    for rule, pattern in _LENIENT:
        letters = [letter.upper() for letter in pattern.findall(plain) if letter.upper() in LETTERS[: len(options)]]
        if letters:
            return Extracted(letters[-1], rule)
    return Extracted(None, "none")


def with_final_line(text: str, options: Sequence[str], language: Language) -> str:
    """A text whose strict letter is known, ending in the line the prompts ask for: in the place of its own answer line
    and the tags around that, or after it where more stands on it than the answer. It begins with no space, which in
    many a chat template would melt into the token before it."""
    letter, rule = strict(text, options)
    lines = text.strip().split("\n")
    while not _segments(lines[-1]):
        lines.pop()
    if rule == "last-line" and len(_segments(lines[-1])) == 1:
        lines.pop()
        while lines and re.fullmatch(r"\s*(?:<[A-Za-z_]{1,20}>|```\w*)?\s*", lines[-1]):
            lines.pop()
    return "\n".join([*lines, ANSWER_LINE[language].format(letter)])


def up_to_letter(text: str, options: Sequence[str], language: Language) -> str:
    """A text up to the place where its letter stands, as the prompts ask for it (:func:`as_asked`); one without a
    strict letter gets an answer line that lacks only that."""
    if strict(text, options).letter is not None:
        return with_final_line(text, options, language)[:-1].rstrip()
    return f"{text.rstrip()}\n{ANSWER_LINE[language].format('')}".rstrip()


def leading(votes: Iterable[str | None]) -> str | None:
    """The letter with more votes than any other; None on a tie or where nothing could be read."""
    ranked = Counter(vote for vote in votes if vote is not None).most_common(2)
    return ranked[0][0] if ranked and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]) else None


def majority(votes: tuple[str | None, ...]) -> str | None:
    """The most frequent letter; ties go to the one voted first; None where nothing could be read."""
    letters = [vote for vote in votes if vote is not None]
    return max(letters, key=lambda letter: (letters.count(letter), -letters.index(letter))) if letters else None


def _segments(text: str) -> list[str]:
    """The lines that say something, with markup as their ends, in plain characters."""
    plain = _MARKUP.sub("\n", _plain(text))
    return [line.strip() for line in plain.split("\n") if line.strip(" .。")]


def _plain(text: str) -> str:
    """Full-width signs as ASCII (NFKC); no emphasis, quotes, boxes or characters without width."""
    text = re.sub(r"<answer>\s*", "\nAnswer: ", unicodedata.normalize("NFKC", text))
    for _ in range(2):  # a box around a font
        text = _BOX.sub(r"\1", text)
    return "".join(c for c in text if c not in "*_`$\"'“”‘’「」『』【】" and unicodedata.category(c) != "Cf")


def _says(rest: str, option: str) -> bool:
    """Whether what stands behind a letter is nothing, or the text of its option."""
    said = re.sub(r"^\s*[.。:、,)\]-]?\s*", "", rest)
    return _bare(said) in ("", _bare(_plain(option)))


def _bare(text: str) -> str:
    return re.sub(r"\s", "", text).strip("()[].。!,;").casefold()
