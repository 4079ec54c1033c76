"""Show the options of a sample in another order, with its chain still right: letters that it names move along."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from stepladder.mcq.answer import with_final_line
from stepladder.mcq.prompts import worked_solution
from stepladder.mcq.shuffle import Permutation, fixed, orders, shown, to_shown
from stepladder.records import LETTERS, Question, Sample
from stepladder.text import nfkc

WORKED_KEY_PREFIX = "worked:"

_SURE = (
    r"(?:选项|(?i:\b(?:option|choice)s?))\s*+[(（]?(?P<named>[A-{last}])(?![A-Za-z])"
    r"|(?<![A-Za-z])(?P<before>[A-{last}])\s*+选项"
    r"|^[^\S\n]*+(?:[-*#]++[^\S\n]*+)?(?:\*\*)?[(（]?(?P<listed>[A-{last}])[.、．:：)）]"
)
"""A letter that is an option's; one at the beginning of a line only if the option's text follows. ``{last}`` is the
last letter."""
_LETTER = r"(?<![A-Za-z])[A-{last}](?![A-Za-z])"
_NUMERALS = "一二两三四五六七八九十\\d"
_UNSURE = (
    rf"{_LETTER}"
    r"|(?i:[(\[][A-{last}][)\]]|^[^\S\n]*+[A-{last}][).:]|(?:\b(?:option|choice|answer)s?|选项|答案)\s*+(?:[A-{last}]|\d++)\b"
    r"|\b(?:first|second|third|fourth|fifth|last|former|latter|next|previous)\s++(?:option|choice|answer|statement)s?\b)"
    rf"|(?:选项|答案)\s*+[{_NUMERALS}](?![样致定])|第\s*+[{_NUMERALS}]++\s*+项"
    rf"|(?:第|最后|前面?|后面?|上面?|下面?)的?\s*+[{_NUMERALS}]*+\s*+[个项]?(?:选项|答案)"
)
"""What may refer to an option by its letter (upper or lower case), its number or its place."""
MAX_DRAWN = 48
"""Orders that are drawn to choose from."""
COMPARED = 12
"""Characters of an option's text that must follow its letter in a list."""
_GONE = "\ufffc"
"""In place of a letter that moves; no letter and no white space."""


def in_order(question: Question, sample: Sample, permutation: Permutation) -> Sample | None:
    """The sample with the options in this order, or None where its chain might not stay right.

    A worked solution is rendered again. Other chains move where every option they refer to before the answer line is
    named by a letter in a form that can only be an option's: "选项A", or "A." and the option's text in a list. The
    moved chain must name the same places.
    """
    if permutation == sample.permutation:
        return sample
    text = worked_solution(question, permutation) if _is_worked(sample) else _moved(question, sample, permutation)
    return None if text is None else sample.model_copy(update={"permutation": permutation, "text": text})


def in_orders(question: Question, sample: Sample, count: int) -> list[Sample]:
    """The sample in up to ``count`` orders of its options, its own first. The right option's letter is another one in
    each, as long as there are enough; fewer orders where the options or the chain allow no more."""
    if count == 1:
        return [sample]
    places = fixed(question).places
    drawn = orders(MAX_DRAWN, len(question.options), "orders", question.id, sample.key, places=places)
    chosen, letters = [sample], Counter[str]()
    while len(chosen) < count:
        letters[to_shown(str(sample.answer), chosen[-1].permutation)] += 1
        rest = [order for order in drawn if order not in {other.permutation for other in chosen}]
        if not rest:
            break
        rarest = min(rest, key=lambda order: letters[to_shown(str(sample.answer), order)])
        if (moved := in_order(question, sample, rarest)) is None:
            break
        chosen.append(moved)
    return chosen


def may_move(question: Question, sample: Sample) -> bool:
    """Whether the sample's chain stays right with the options in any other order."""
    others = list(sample.permutation)
    others[0], others[1] = others[1], others[0]
    return in_order(question, sample, tuple(others)) is not None


def _is_worked(sample: Sample) -> bool:
    """Whether the sample's chain is the worked solution that came with the question."""
    return sample.key.startswith(WORKED_KEY_PREFIX)


def _moved(question: Question, sample: Sample, order: Permutation) -> str | None:
    """The chain for another order, or None where it refers to an option in a way that is not sure."""
    old, new = shown(question.options, sample.permutation), shown(question.options, order)
    chain, _, line = with_final_line(sample.text, old, question.language).rpartition("\n")
    moves = {LETTERS[place]: LETTERS[order.index(index)] for place, index in enumerate(sample.permutation)}
    if (places := _places(chain, old, question)) is None:
        return None
    letters = list(f"{chain}\n{line}" if chain else line)
    for place in (*places, len(letters) - 1):
        letters[place] = moves[letters[place]]
    moved = "".join(letters)
    return moved if _places(moved.rpartition("\n")[0], new, question) == places else None


def _places(chain: str, options: Sequence[str], question: Question) -> list[int] | None:
    """Where the chain names an option by its letter, or None where one of them, or of other references, is not sure."""
    last = LETTERS[len(options) - 1]
    sure, letter, unsure = (
        re.compile(pattern.replace("{last}", last), re.MULTILINE) for pattern in (_SURE, _LETTER, _UNSURE)
    )
    mentions = [match for match in sure.finditer(chain) if _is_sure(match, chain, options)]
    rest = list(chain)
    for match in mentions:
        rest[match.start() : match.end()] = _GONE * (match.end() - match.start())
    if unsure.search(nfkc("".join(rest))):
        return None
    if mentions and letter.search("\n".join((question.problem, question.question, *options))):
        return None  # the letter may be somebody's name
    return [match.start(str(match.lastgroup)) for match in mentions]


def _is_sure(match: re.Match[str], chain: str, options: Sequence[str]) -> bool:
    if match.lastgroup != "listed":
        return True
    option = _comparable(options[LETTERS.index(match["listed"])])[:COMPARED]
    return _comparable(chain[match.end() : match.end() + 4 * COMPARED]).startswith(option)


def _comparable(text: str) -> str:
    return re.sub(r"[\s*`\[\]()（）]", "", text)
