"""A stranger's text, made safe to compute with and to print."""

from __future__ import annotations

import re
import unicodedata

MAX_NONSTARTERS = 30
"""Combining characters in a row, as in the stream-safe text format of UAX #15, section 13."""
GRAPHEME_JOINER = "\u034f"
_NONSTARTERS = re.compile(rf"[^\x00-\u02ff]{{{MAX_NONSTARTERS + 1},}}")
"""Runs of characters that may be combining; all of those are above U+02FF."""
_PHRASES = ("\ufdfa", "\ufdfb")
_PHRASE = re.compile("([\ufdfa\ufdfb])")
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
"""C0 and C1 controls but tab and newline, which terminals act upon, and what reorders or hides text."""
USUAL_CONTROL_TOKENS = re.compile(
    r"<[|｜][^<>|｜\s]{1,64}[|｜]>|</?s>|<[be]os>|<(?:start|end)_of_turn>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
)
"""Control tokens of ChatML, Llama, Phi, DeepSeek (``<|...|>``, also with full-width bars), Mistral and Gemma."""
_SURROGATES = re.compile("[\ud800-\udfff]")


def nfkc(text: str) -> str:
    """The text in compatibility composition (NFKC).

    Normalising takes time quadratic in the length of a run of combining characters; long ones are interrupted by
    grapheme joiners. The Arabic phrases that would unfold into up to 18 characters each are left as they are.
    """
    safe = _NONSTARTERS.sub(_interrupted, text)
    return "".join(part if part in _PHRASES else unicodedata.normalize("NFKC", part) for part in _PHRASE.split(safe))


def nfkc_bytes(text: str) -> int:
    """An upper bound on the bytes of a text's compatibility composition (NFKC) in UTF-8: those of :func:`nfkc`, and the
    phrases unfolded."""
    if text.isascii():
        return len(text)
    phrases = sum(text.count(phrase) * len(unicodedata.normalize("NFKC", phrase).encode()) for phrase in _PHRASES)
    return len(nfkc(text).encode()) + phrases


def _interrupted(run: re.Match[str]) -> str:
    characters: list[str] = []
    nonstarters = 0
    for character in run[0]:
        nonstarters = nonstarters + 1 if unicodedata.combining(character) else 0
        if nonstarters > MAX_NONSTARTERS:
            characters.append(GRAPHEME_JOINER)
            nonstarters = 1
        characters.append(character)
    return "".join(characters)


def printable(text: str) -> str:
    """The text as a terminal may be given it: what it would act upon or hide stands there by its code (``\\x1b``)."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def without_control_tokens(control_tokens: re.Pattern[str], text: str) -> str:
    """The text with a space behind the first character of what a model's tokenizer would take for a control token: in
    a question or a chain, ``<|im_end|>`` would end the turn."""
    while (broken := control_tokens.sub(lambda match: f"{match[0][0]} {match[0][1:]}".rstrip(), text)) != text:
        text = broken
    return text


def well_formed(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON can name and no UTF-8 file or database can hold."""
    return _SURROGATES.sub("\ufffd", text)
