"""What goes wrong when people write multiple-choice questions by the hundred, put right where only one reading is
possible; all else is left as it is and reported. Nothing is dropped."""

from __future__ import annotations

import re
from typing import NamedTuple

from stepladder.records import LETTERS

_MERGED = re.compile(r"\s*\n\s*([A-Z])\s*[.、．:：)）]\s*")  # "Spain\nC. Japan\nD. France" as one option
# A backslash and an n, alone at the beginning of a line or before what is no letter: \neq and \nu are LaTeX.
_NEWLINE = re.compile(r"(?:\n[ \t]*\\n|[ \t]*\\n(?![A-Za-z]))[ \t]*\n?")
_BOLD_END = re.compile(r"\*\*[ \t]*(?=\n|$)")
_FENCE_EDGE = re.compile(r"^\s*```|```\s*$")
_NUMBERED = re.compile(r"^\W*(?:选择题|问题|题目|题|Question|Q)\s*\d*\s*[.、．:：)）]+\W*", re.IGNORECASE)

_LEAK = re.compile(
    r"(?:(?:正确)?答案|正确选项)\s*(?:是|为)?\s*[:：]?\s*[(（]?[A-Z](?![A-Za-z])[)）]?"
    r"|\b[Tt]he (?:correct |right )?answer is:? \(?[A-Z](?![A-Za-z])|\b(?:[Cc]orrect )?[Aa]nswer: ?\(?[A-Z](?![A-Za-z])"
)


class Note(NamedTuple):
    """Something odd about a text: what kind, and what was done about it or what it is."""

    kind: str
    message: str


class Repaired(NamedTuple):
    """A question as it was meant. ``answer`` names the same option as before, whatever letter that has now."""

    question: str
    options: tuple[str, ...]
    answer: str | None
    notes: tuple[Note, ...]


def clean(text: str, notes: list[Note]) -> str:
    """A text without debris: written-out newlines, a bold mark or code fence that nothing opens or closes."""
    kept = text.strip()
    if _NEWLINE.search(kept):
        kept = _NEWLINE.sub("\n", kept).strip()
        notes.append(Note("debris", "\\n written out, made a newline"))
    if kept.count("```") % 2 and _FENCE_EDGE.search(kept):
        kept = _FENCE_EDGE.sub("", kept, count=1).strip()
        notes.append(Note("debris", "code fence that nothing closes, removed"))
    if kept.count("**") % 2 and _BOLD_END.search(kept):
        kept = _BOLD_END.sub("", kept, count=1).strip()
        notes.append(Note("debris", "bold mark ** that nothing closes, removed"))
    if kept.count("`") % 2 and "```" not in kept and (kept[0] == "`" or kept[-1] == "`"):
        kept = kept[1:] if kept[0] == "`" else kept[:-1]
        notes.append(Note("debris", "quote mark ` that nothing closes, removed"))
    return kept


def note_defects(text: str, notes: list[Note]) -> None:
    """Note what nobody can put right: a lost character, or an answer that the text gives away."""
    if "\ufffd" in text:
        notes.append(Note("broken text", "holds U+FFFD (a lost character)"))
    if leak := _LEAK.search(text):
        notes.append(Note("leaked answer", f"gives an answer away: {' '.join(leak[0].split())!r}"))


def split_merged(options: tuple[str, ...], answer: str | None, notes: list[Note]) -> tuple[tuple[str, ...], str | None]:
    """Options of which one holds further lettered ones, each as an option of its own.

    Only where the letters inside go upwards from the option's own, so that a list inside an option stays whole. A label
    beyond the options as written names one of those inside.
    """
    found: list[str] = []
    written = None if answer is None else LETTERS.index(answer)
    chosen = written
    for index, option in enumerate(options):
        pieces = _MERGED.split(option)
        inner = pieces[1::2]
        own = LETTERS[min(len(found), len(LETTERS) - 1)]
        if inner and all(a < b for a, b in zip([own, *inner], inner, strict=False)) and all(pieces[::2]):
            notes.append(Note("merged options", f"option {own} held {', '.join(inner)} as well, split"))
            if chosen is not None and written is not None and index < written < len(options):
                chosen += len(inner)
            found += pieces[::2]
        else:
            found.append(option)
    return tuple(found), None if chosen is None else LETTERS[chosen]


def repair(question: str, options: tuple[str, ...], answer: str | None) -> Repaired:
    """A question and its options as they were meant, with a note on all that was odd."""
    notes: list[Note] = []
    stem = clean(question, notes)
    split, moved = split_merged(tuple(option.strip() for option in options), answer, notes)
    kept = tuple(clean(option, notes) for option in split)
    if not _NUMBERED.sub("", stem, count=1).strip():
        notes.append(Note("empty question", "has no question text of its own; the problem must ask it"))
    if any(not option for option in kept):
        notes.append(Note("empty option", "has an option without text"))
    if len(set(kept)) < len(kept):
        same = [letter for letter, option in zip(LETTERS, kept, strict=False) if kept.count(option) > 1]
        labelled = f", and {moved} is the label" if moved in same else ""
        notes.append(Note("repeated option", f"offers the same option as {' and '.join(same)}{labelled}"))
    note_defects("\n".join((stem, *kept)), notes)
    return Repaired(stem, kept, moved, tuple(notes))
