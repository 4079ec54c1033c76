"""Chains fit for a student: debris of prompts and chat formats is removed, and a chain that no teacher would show is
refused.

The forms are those of recorded answers of six models (Llama 3.1, Qwen2, DeepSeek-Coder-V2). A student that learns from
them writes them itself: of one trained on such chains as they were, 199 of 200 answers began with ``Assistant:``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stepladder.mcq.answer import is_an_option, lenient, strict, with_final_line
from stepladder.mcq.shuffle import shown
from stepladder.records import LETTERS, Language, Question, Sample
from stepladder.text import USUAL_CONTROL_TOKENS

MIN_CHARACTERS = 6
"""Of a chain without its answer line and without lines that only repeat an option; less is no reasoning."""
PASSES = 4
"""How often each form of debris is looked for, at most; the last must find nothing."""
REPEATED_CHARACTERS, MAX_REPEATS = 30, 6
"""A passage of so many characters, white space left out, that occurs more often makes a chain a loop."""

_ROLE = re.compile(
    r"\A[\s.=_\"(]*+(?:<\|[^<>|\s]{1,64}\|>\s*+)*+"
    r"(?:(?i:doc)?(?i:assistant|user|system|human)|助手|用户)\"?(?:<\|[^<>|\s]{1,64}\|>)*+[ \t]*+"
    r"(?:[:：]|\n|(?=[<一-鿿]))"
)
_BEGINNING = re.compile(r"\A(?:[\s:：\ufffd]++|[^\s<>]{0,6}>)++")
"""White space, characters that could not be decoded, and the end of a tag whose beginning is lost."""
_FIRST_WORD = re.compile(
    r"\A[\s._(-]*+(?i:answers?|steps?|output|response|reasoning|explanations?|explains|analy[sz]e|summary|document|docstring)"
    r"[)>]?[ \t]*+[:：]?[ \t]*+(?=\n|[一-鿿])"
)
_LATIN_LINE = re.compile(r"\A[A-Za-z._=:()\"<> -]{1,40}\n(?=\s*+[<*#\d]*+\s*+[一-鿿])")
"""A first line without a Chinese character before a Chinese text: ``.com``, ``step-by-step-analysis:``."""
_LONE_WORD = re.compile(r"\A[^\s。，：:,.]{1,4}\n[ \t]*+\n(?=\s*+\S{5})")
"""A first line of a few characters that an empty line follows: what is left of a heading, or of a lost beginning."""
_SECOND_THOUGHTS = re.compile(
    r"(?:题目|题干|问题)中?(?:所)?(?:给出|提供|给定|标注)的(?:正确)?(?:答案|选项是)|(?:标准|参考|给定的?|已知的?)答案"
    r"|重新(?:检查|评估|审视|审查|核对)|(?:推理|分析|思考)过程(?:是|中)?(?:正确|没有|无误|有误|存在|合理)|遗漏或错误"
    r"|(?i:(?:given|provided|stated|expected|reference) answer (?:is|was|says)"
    r"|re-?(?:check|evaluate|examine|consider)ing (?:the|my|this)|(?:reasoning|analysis) (?:is|was) (?:in)?correct)"
)
"""A chain that judges its own reasoning, or bends it to an answer it was given."""
_TAG = re.compile(r"</?(?i:think(?:ing)?|reflection|output|answer|response|reasoning|solution|summary|step|result)>")
_FENCE = re.compile(r"^[ \t]*+```\w{0,20}[ \t]*+$\n?", re.MULTILINE)
_WITHIN = re.compile(r"[，。、；）》”,;)\]]")
_QUESTION = re.compile(r"^[ \t#*]*+(?:选择题|问题|Question)[ \t]*+\d{1,3}[ \t]*+[:：]", re.MULTILINE)
_ANSWER_HEADING = re.compile(r"[#*]*+(?:最终|正确)?(?:答案|Answer)[:：]?[*]*+")
_NAMED = {"last-line", "last-clause", "phrase"}
"""Rules by which a line says what the answer is."""
_BLANK_LINES = re.compile(r"\n[ \t]*+(?:\n[ \t]*+)++")


class Cleaned(NamedTuple):
    """A chain without debris."""

    text: str
    """It ends in the answer line that the prompts ask for, unless there is a flaw."""
    forms: tuple[str, ...] = ()
    """What was removed, by the names of :data:`FORMS`."""
    flaw: str | None = None
    """Why the chain must not train anybody, by the names of :data:`FLAWS`."""


Remove = Callable[[str, Sequence[str]], str]
"""A chain without a form of debris, from the chain and the options."""


def _without(pattern: re.Pattern[str]) -> Remove:
    return lambda text, options: pattern.sub("", text)


def _without_reflection(text: str, options: Sequence[str]) -> str:
    """The text without ``<reflection>`` blocks, in which models judge their own reasoning; one that is not closed ends
    at the next ``<output>``, or with the text."""
    kept, position, lower = [], 0, text.lower()
    while (begin := lower.find("<reflection>", position)) >= 0:
        kept.append(text[position:begin])
        end = lower.find("</reflection>", begin)
        if end < 0:
            end = lower.find("<output>", begin)
            position = len(text) if end < 0 else end
            break
        position = end + len("</reflection>")
    return "".join([*kept, text[position:]])


def _without_question(text: str, options: Sequence[str]) -> str:
    """The text without a beginning that repeats the question: up to three lines, and the list of all options."""
    lines = text.lstrip().split("\n")
    filled = [index for index, line in enumerate(lines) if line.strip()]
    for start in range(min(4, len(filled) - len(options))):
        listed = filled[start : start + len(options)]
        if all(_lists(lines[index], *option) for index, option in zip(listed, enumerate(options), strict=True)):
            return "\n".join(lines[listed[-1] + 1 :]).lstrip()
    return text


def _lists(line: str, place: int, option: str) -> bool:
    """Whether a line is an option and nothing else."""
    found = re.fullmatch(rf"[\s*#>-]*+{LETTERS[place]}[*\s]*+[.、．:：)）]?(.*)", line)
    return found is not None and "".join(found[1].split()).strip("*。.") == "".join(option.split()).strip("*。.")


FORMS: dict[str, Remove] = {
    "role": lambda text, options: _BEGINNING.sub("", _ROLE.sub("", _BEGINNING.sub("", text))),
    "control token": _without(USUAL_CONTROL_TOKENS),
    "reflection": _without_reflection,
    "tag": _without(_TAG),
    "first word": lambda text, options: _FIRST_WORD.sub("", text.lstrip()),
    "first line": lambda text, options: _LONE_WORD.sub("", _LATIN_LINE.sub("", text.lstrip()).lstrip()),
    "code fence": _without(_FENCE),
    "question": _without_question,
}
"""What removes each form of debris, in the order in which they are removed."""
FLAWS = {
    "begins within": "because they begin in the middle of a sentence",
    "answers first": "because they give the answer before the reasons",
    "several questions": "because they hold further questions",
    "two answers": "because they name another letter before their last line",
    "no reasoning": "because nothing but options and the answer is in them",
    "second thoughts": "because they judge their own reasoning, or bend it to an answer they were given",
    "repeats": "because they repeat a passage over and over",
    "answer lost": "because their answer was in what had to be removed",
    "debris throughout": f"because debris is left after {PASSES} passes over them",
}


def clean(text: str, options: Sequence[str], language: Language) -> Cleaned:
    """A chain with a strict letter, without debris and with the answer line that the prompts ask for.

    Args:
        text: the chain, which has a strict letter.
        options: the options' texts in the order the model was shown them.
    """
    cleaned = _clean(text, options, language, [*FORMS])
    if cleaned.flaw == "no reasoning" and "reflection" in cleaned.forms:  # it is all the reasoning there is
        return _clean(text, options, language, [name for name in FORMS if name != "reflection"])
    return cleaned


def clean_sample(question: Question, sample: Sample) -> Cleaned:
    """The chain of a sample that has a strict letter, in the order of the options that it was shown."""
    return clean(sample.text, shown(question.options, sample.permutation), question.language)


def _clean(text: str, options: Sequence[str], language: Language, names: list[str]) -> Cleaned:
    letter, chain = strict(text, options).letter, text
    forms: dict[str, None] = {}
    for _ in range(PASSES):
        before = chain
        for name in names:
            if (removed := FORMS[name](chain, options)).strip() != chain.strip():
                forms[name], chain = None, removed
        if chain == before:
            break  # else what was removed may have stood before more of it
    else:
        return Cleaned(text, tuple(forms), "debris throughout")
    if strict(chain, options).letter != letter:
        return Cleaned(text, tuple(forms), "answer lost")
    chain = _BLANK_LINES.sub("\n\n", with_final_line(chain.strip(), options, language))
    *lines, answer = chain.split("\n")
    while lines and (not lines[-1].strip() or strict(lines[-1], options) == (letter, "last-line")):
        lines.pop()  # the same answer, said twice
    reasoning = "\n".join(lines)
    return Cleaned(f"{reasoning}\n{answer}".strip(), tuple(forms), _flaw(reasoning, letter, options))


def _flaw(reasoning: str, letter: str | None, options: Sequence[str]) -> str | None:
    """The first flaw of a chain without its answer line."""
    compact = "".join(reasoning.split())
    lines = [line for line in reasoning.split("\n") if line.strip()]
    said = [lenient(line, options) for line in lines]
    reasons = "".join(line for line in lines if not is_an_option(line, options))
    heading = "".join(reasoning.lstrip().partition("\n")[0].split())
    found = {
        "no reasoning": len("".join(reasons.split())) < MIN_CHARACTERS,
        "begins within": _WITHIN.match(compact),
        "answers first": len(said) > 1 and (said[0].rule == "last-line" or _ANSWER_HEADING.fullmatch(heading)),
        "two answers": any(line.letter not in (None, letter) and line.rule in _NAMED for line in said),
        "second thoughts": _SECOND_THOUGHTS.search(reasoning),
        "several questions": len(_QUESTION.findall(reasoning)) > 1,
        "repeats": _repeats(compact),
    }
    return next((flaw for flaw, holds in found.items() if holds), None)


def _repeats(compact: str) -> bool:
    starts = range(len(compact) - REPEATED_CHARACTERS + 1)
    passages = Counter(compact[start : start + REPEATED_CHARACTERS] for start in starts)
    return bool(passages) and max(passages.values()) > MAX_REPEATS
