"""Extract the answer letter from a model's text, with the rule that matched.

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
from stepladder.text import nfkc

ANSWER_LINE: dict[Language, str] = {"en": "Answer: {}", "zh": "答案是：{}"}
"""The last line that the prompts ask for."""


class Extracted(NamedTuple):
    """A letter, None where no rule matched, and the name of the rule that did."""

    letter: str | None
    rule: str


# All patterns match text that _plain has normalised: full-width signs are ASCII, emphasis and quotes are gone, spaces
# are single. The text is a model's, so each pattern takes time that is linear in its length: what repeats is possessive
# (*+), or cannot match the same characters in two ways.
_MARKUP = re.compile(r"</?[A-Za-z_]{1,20}>|<\|\w{1,20}\|>|^ ?```\w*+|``` ?$|^ ?-{3,}+ ?$", re.MULTILINE)
_CLAUSE = re.compile(r"[。！!?;.] ?|, ?(?=因此|所以|因而|故|(?:therefore|thus|so|hence)\b)", re.IGNORECASE)
_LEAD = (
    r"(?:(?:assistant|助手) ?: ?)?"
    r"(?:(?:综上(?:所述)?|因此|因而|所以|由此(?:可见|可知)?|那么|于是|最终|最后|结论|可见|从而|总之|故|输出(?:为|是)?|答案是|"
    r"(?:根据|基于|综合)[^,。;]{1,40}|(?:based on|according to|given) [^,.;]{1,60}|"
    r"therefore|thus|so|hence|finally|consequently|in (?:conclusion|summary)) ?[,:]? ?){0,3}"
)
_NAMING = (
    r"(?:(?:正确|正確|最终|最后|最佳|唯一|本题|这道题|该题|此题|题目|问题|的)*(?:答案|选项|回答)(?:应该|应当|应)?\s*[是為为选選:]+"
    r"|(?:应该|应当|应)?选(?:择|项)?(?:的是|是|:)?"
    r"|(?:the |my |our )?(?:(?:final|correct|right|best|only) )*(?:answer|option|choice)(?: is ?:?| ?:))"
)
_ANSWER = re.compile(
    rf"[ #>•-]*+(?i:{_LEAD}{_NAMING} ?(?:选项|答案|option |choice )?)"
    r" ?[(\[]? ?([A-Z])(?![A-Za-z\d]) ?[)\]]?(?:选?项)?(.*)"
)
_LISTED = re.compile(r"\A[\s#>•-]*+[(\[]?[A-Z][)\]]?[.:、]?")
"""What an option begins with in a list: ``A.``, ``- (B)``."""
_MAX_LEAD = 400
"""Characters of an answer line but for the option's text: what :data:`_ANSWER` can match."""
_MAX_CLAUSES = 100
"""Clauses at the end of a line in which an answer is looked for."""
_BOX = re.compile(r"\\(?:boxed|text|mathrm|mathbf) ?\{([^{}]*+)\}")
_LENIENT = (
    ("phrase", re.compile(r"(?i:answer(?: is)?|答案(?:是|为|選|选)?)\s*+:?\s*+[(\[]?([A-Z])(?![A-Za-z])")),
    ("phrase", re.compile(r"(?i:answer(?: is)?)\s*+:\s*+[(\[]?([a-z])[)\].]*+$", re.MULTILINE)),
    ("option", re.compile(r"(?i:option|选项?|choice)\s*+[(\[]?([A-Z])(?![A-Za-z])")),
    ("bare", re.compile(r"^ ?[(\[]?([A-Z])[)\]]?[.。:]? ?$", re.MULTILINE)),
)


class _Removed(dict[int, int | None]):
    """A table for ``str.translate`` without emphasis, quotes and format characters; it fills as they are met."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        is_removed = character in "*_`$\"'“”‘’「」『』【】" or unicodedata.category(character) == "Cf"
        self[code] = None if is_removed else code
        return self[code]


_REMOVED = _Removed()


def strict(text: str, options: Sequence[str]) -> Extracted:
    """The letter of the answer line that a text ends with.

    The line is ``Answer: X`` or ``答案是：X``, as the prompts ask for, or one of the common variants: a conclusion
    ("因此", "Therefore") before it, emphasis or brackets around the letter, closing tags after it. After the letter
    only the text of that option may follow. With two letters, a question mark, a reason or another option's text there
    is no strict letter.

    Args:
        text: the model's answer.
        options: the options' texts in the order the model was shown them.
    """
    line = (_content_lines(text) or [""])[-1]
    earliest = len(line) - _MAX_LEAD - 2 * max(map(len, options), default=0)
    begins = [begin for begin in (0, *(clause.end() for clause in _CLAUSE.finditer(line))) if begin >= earliest]
    rules = {}
    for begin in begins[-_MAX_CLAUSES:]:
        match = _ANSWER.fullmatch(line, begin)
        if (
            match
            and match[1] in LETTERS[: len(options)]
            and _is_empty_or_option(match[2], options[LETTERS.index(match[1])])
        ):
            rules[match[1]] = "last-line" if begin == 0 else "last-clause"
    if len(rules) != 1 or {*rules} != {*rules, *_LENIENT[0][1].findall(line)}:
        return Extracted(None, "none")
    return Extracted(*rules.popitem())


def lenient(text: str, options: Sequence[str]) -> Extracted:
    """The strict letter, or else the last letter named by the first phrasing of :data:`_LENIENT` that matches."""
    extracted = strict(text, options)
    if extracted.letter is not None:
        return extracted
    plain = _plain(text)
    for rule, pattern in _LENIENT:
        letters = [letter.upper() for letter in pattern.findall(plain) if letter.upper() in LETTERS[: len(options)]]
        if letters:
            return Extracted(letters[-1], rule)
    return Extracted(None, "none")


def with_final_line(text: str, options: Sequence[str], language: Language) -> str:
    """The text, which must have a strict letter, with the answer line that the prompts ask for as its last line.

    The new line replaces the text's own answer line and the tags around it; where that line holds more than the answer,
    the new one is added below. Leading spaces are removed: many chat templates merge them into the token before them.
    """
    letter, rule = strict(text, options)
    lines = text.strip().split("\n")
    while not _content_lines(lines[-1]):
        lines.pop()
    if rule == "last-line" and len(_content_lines(lines[-1])) == 1:
        lines.pop()
        while lines and re.fullmatch(r"\s*+(?:<[A-Za-z_]{1,20}>|```\w*+)?\s*+", lines[-1]):
            lines.pop()
    return "\n".join([*lines, ANSWER_LINE[language].format(letter)])


def up_to_letter(text: str, options: Sequence[str], language: Language) -> str:
    """The text of :func:`with_final_line` up to, not including, the letter. A text without a strict letter gets an
    answer line without a letter."""
    if strict(text, options).letter is not None:
        return with_final_line(text, options, language)[:-1].rstrip()
    return f"{text.rstrip()}\n{ANSWER_LINE[language].format('')}".rstrip()


def leading(votes: Iterable[str | None]) -> str | None:
    """The letter with more votes than any other; None on a tie or where no vote could be read."""
    ranked = Counter(vote for vote in votes if vote is not None).most_common(2)
    return ranked[0][0] if ranked and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]) else None


def majority(votes: tuple[str | None, ...]) -> str | None:
    """The most frequent letter; of several, the one voted for first; None where no vote could be read."""
    letters = [vote for vote in votes if vote is not None]
    return max(letters, key=lambda letter: (letters.count(letter), -letters.index(letter))) if letters else None


def _content_lines(text: str) -> list[str]:
    """The lines of a text that are not empty, as :func:`_plain` normalises them. Markup ends a line."""
    plain = _MARKUP.sub("\n", _plain(text))
    return [line.strip() for line in plain.split("\n") if line.strip(" .。")]


def _plain(text: str) -> str:
    """The text in NFKC (full-width signs become ASCII) with single spaces, without emphasis, quotes, LaTeX boxes and
    format characters."""
    text = re.sub(r"[^\S\n]++", " ", nfkc(text))
    text = re.sub(r"<answer>\s*+", "\nAnswer: ", text)
    for _ in range(2):  # a box around a font
        text = _BOX.sub(r"\1", text)
    return text.translate(_REMOVED)


def _is_empty_or_option(rest: str, option: str) -> bool:
    """Whether ``rest``, the end of an answer line after the letter, is empty or the text of the letter's option."""
    text = re.sub(r"^ ?[.。:、,)\]-]? ?", "", rest)
    return _comparable(text) in ("", _comparable(_plain(option)))


def is_an_option(line: str, options: Sequence[str]) -> bool:
    """Whether a line is nothing but an option's text, with or without a letter before it."""
    plain, texts = _plain(line), {_comparable(_plain(option)) for option in options}
    return not texts.isdisjoint({_comparable(plain), _comparable(_LISTED.sub("", plain))})


def _comparable(text: str) -> str:
    return re.sub(r"\s", "", text).strip("()[].。!,;").casefold()
