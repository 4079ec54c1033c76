"""Repair hand-written multiple-choice questions where only one reading is possible; other defects are only reported.
Nothing is dropped."""

from __future__ import annotations

import re
from typing import NamedTuple

from stepladder.records import LETTERS

_MERGED = re.compile(r"\n[^\S\n]*+([A-Z])[^\S\n]*+[.、．:：)）]")  # "Spain\nC. Japan\nD. France" as one option
# A backslash and an n, alone at the beginning of a line or not before a letter: \neq and \nu are LaTeX.
_NEWLINE = re.compile(r"(?:\n[ \t]*+\\n|(?<![ \t])[ \t]*+\\n(?![A-Za-z]))[ \t]*+\n?")
_BOLD_END = re.compile(r"\*\*[ \t]*+(?=\n|$)")
_FENCE_EDGE = re.compile(r"^\s*```|```\s*$")
_NUMBERED = re.compile(r"^\W*+(?:选择题|问题|题目|题|Question|Q)\s*+\d*+\s*+[.、．:：)）]++\W*+", re.IGNORECASE)

_LEAK = re.compile(
    r"(?:(?:正确)?答案|正确选项)\s*+(?:是|为)?\s*+[:：]?\s*+[(（]?[A-Z](?![A-Za-z])[)）]?"
    r"|\b[Tt]he (?:correct |right )?answer is:? \(?[A-Z](?![A-Za-z])|\b(?:[Cc]orrect )?[Aa]nswer: ?\(?[A-Z](?![A-Za-z])"
)


class Note(NamedTuple):
    """Something odd about a text: its kind, and a message that says what it is or how it was repaired."""

    kind: str
    message: str


class Repaired(NamedTuple):
    """A repaired question. ``answer`` is the letter that the labelled option has after the repair."""

    question: str
    options: tuple[str, ...]
    answer: str | None
    notes: tuple[Note, ...]


def clean(text: str, notes: list[Note]) -> str:
    """The text without debris: written-out newlines, and unpaired bold marks, code fences and quote marks."""
    cleaned = text.strip()
    if _NEWLINE.search(cleaned):
        cleaned = _NEWLINE.sub("\n", cleaned).strip()
        notes.append(Note("debris", "\\n written out, made a newline"))
    if cleaned.count("```") % 2 and _FENCE_EDGE.search(cleaned):
        cleaned = _FENCE_EDGE.sub("", cleaned, count=1).strip()
        notes.append(Note("debris", "code fence that nothing closes, removed"))
    if cleaned.count("**") % 2 and _BOLD_END.search(cleaned):
        cleaned = _BOLD_END.sub("", cleaned, count=1).strip()
        notes.append(Note("debris", "bold mark ** that nothing closes, removed"))
    if cleaned.count("`") % 2 and "```" not in cleaned and (cleaned[0] == "`" or cleaned[-1] == "`"):
        cleaned = cleaned[1:] if cleaned[0] == "`" else cleaned[:-1]
        notes.append(Note("debris", "quote mark ` that nothing closes, removed"))
    return cleaned


def note_defects(text: str, notes: list[Note]) -> None:
    """Note defects that cannot be repaired: a lost character, or an answer that the text gives away."""
    if "\ufffd" in text:
        notes.append(Note("broken text", "holds U+FFFD (a lost character)"))
    if leak := _LEAK.search(text):
        notes.append(Note("leaked answer", f"gives an answer away: {' '.join(leak[0].split())!r}"))


def split_merged(options: tuple[str, ...], answer: str | None, notes: list[Note]) -> tuple[tuple[str, ...], str | None]:
    """Split options whose text contains further lettered options, and move the label with its option.

    An option is split only if the letters in it ascend from its own, so that other lists in an option stay whole. A
    label beyond the options as written refers to one that was inside another.

    Returns:
        The options and the label's letter among them.
    """
    split: list[str] = []
    label_index = None if answer is None else LETTERS.index(answer)
    moved_index = label_index
    for index, option in enumerate(options):
        pieces = [piece.strip() for piece in _MERGED.split(option)]
        inner_letters = pieces[1::2]
        own = LETTERS[min(len(split), len(LETTERS) - 1)]
        if (
            inner_letters
            and len(split) + len(inner_letters) + len(options) - index <= len(LETTERS)
            and all(a < b for a, b in zip([own, *inner_letters], inner_letters, strict=False))
            and all(pieces[::2])
        ):
            notes.append(Note("merged options", f"option {own} held {', '.join(inner_letters)} as well, split"))
            if moved_index is not None and label_index is not None and index < label_index < len(options):
                moved_index += len(inner_letters)
            split += pieces[::2]
        else:
            split.append(option)
    return tuple(split), None if moved_index is None else LETTERS[moved_index]


def repair(question: str, options: tuple[str, ...], answer: str | None) -> Repaired:
    """Repair a question and its options, and note everything odd about them."""
    notes: list[Note] = []
    stem = clean(question, notes)
    split, moved = split_merged(tuple(option.strip() for option in options), answer, notes)
    cleaned = tuple(clean(option, notes) for option in split)
    if not _NUMBERED.sub("", stem, count=1).strip():
        notes.append(Note("empty question", "has no question text of its own; the problem must ask it"))
    if any(not option for option in cleaned):
        notes.append(Note("empty option", "has an option without text"))
    if len(set(cleaned)) < len(cleaned):
        same = [letter for letter, option in zip(LETTERS, cleaned, strict=False) if cleaned.count(option) > 1]
        labelled = f", and {moved} is the label" if moved in same else ""
        notes.append(Note("repeated option", f"offers the same option as {' and '.join(same)}{labelled}"))
    note_defects("\n".join((stem, *cleaned)), notes)
    return Repaired(stem, cleaned, moved, tuple(notes))
