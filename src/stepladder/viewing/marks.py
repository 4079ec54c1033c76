"""Texts that models or strangers wrote, as markup: what would be hidden is shown, and what matters is marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from stepladder.mcq.answer import strict
from stepladder.text import HIDDEN, well_formed

MAX_ALIGNED = 300
"""Sentences of a text; of longer texts the rest is not aligned."""
MAX_COMPARED = 2000
"""Characters of two sentences that are compared one by one."""
DELETED, INSERTED = Markup("<del>{}</del>"), Markup("<ins>{}</ins>")
_SENTENCE = re.compile(r"[^。！？；.!?;\n]*+(?:[。！？；!?;\n]++|\.(?!\d)\s*+|\.|$)")


def visible(text: str) -> Markup:
    """The text, escaped, in which each character that would be hidden or reorders others is named."""
    parts, end = [], 0
    text = well_formed(text)
    for match in HIDDEN.finditer(text):
        code = f"U+{ord(match[0]):04X}"
        parts += [escape(text[end : match.start()]), Markup('<span class="hidden">{}</span>').format(code)]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def chain(text: str, options: Sequence[str]) -> Markup:
    """A chain in which the line that its letter was read from is marked."""
    body = text.rstrip()
    if strict(text, options).letter is None:
        return visible(text)
    before, newline, last = body.rpartition("\n")
    return visible(before + newline) + Markup("<mark>{}</mark>").format(visible(last))


def aligned(left: str, right: str) -> list[tuple[Markup, Markup, bool]]:
    """Two texts sentence by sentence, with whether the two are the same; differing characters are marked."""
    before, after = _sentences(left), _sentences(right)
    rows = []
    for kind, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        olds, news = before[i:j], after[k:m]
        for number in range(max(len(olds), len(news))):
            old, new = (part[number] if number < len(part) else "" for part in (olds, news))
            if kind == "equal":
                rows.append((visible(old), visible(new), True))
            else:
                rows.append((*_compared(old, new), False))
    return rows


def _sentences(text: str) -> list[str]:
    found = [sentence for sentence in _SENTENCE.findall(text) if sentence]
    return [*found[:MAX_ALIGNED], "".join(found[MAX_ALIGNED:])] if len(found) > MAX_ALIGNED else found


def _compared(old: str, new: str) -> tuple[Markup, Markup]:
    """Two sentences in which what only one of them has is marked, character by character."""
    if not old or not new or len(old) + len(new) > MAX_COMPARED:
        return _changed(old, DELETED), _changed(new, INSERTED)
    blocks = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return (
        Markup("").join(
            visible(old[i:j]) if kind == "equal" else _changed(old[i:j], DELETED) for kind, i, j, _, _ in blocks
        ),
        Markup("").join(
            visible(new[k:m]) if kind == "equal" else _changed(new[k:m], INSERTED) for kind, _, _, k, m in blocks
        ),
    )


def _changed(text: str, mark: Markup) -> Markup:
    return mark.format(visible(text)) if text else Markup("")
