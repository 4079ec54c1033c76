"""Rules of a logic program as head and conditions, so that mistakes can drop conditions and watchers can test them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_ATOM = re.compile(r"(not )?([a-z]\w*(?:\(.*\))?)")
_VARIABLE = re.compile(r"\b[A-Z]\w*")


@dataclass(frozen=True)
class Condition:
    """One condition in a rule's body; `text` is all of it, `atom` is empty for a comparison such as `N < 3`."""

    text: str
    atom: str
    negated: bool

    @property
    def variables(self) -> frozenset[str]:
        return variables(self.text)


@dataclass(frozen=True)
class Rule:
    """`head :- body.`, or a fact when the body is empty."""

    head: str
    body: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.head} :- {', '.join(self.body)}." if self.body else f"{self.head}."

    @property
    def conditions(self) -> tuple[Condition, ...]:
        matches = ((text, _ATOM.fullmatch(text)) for text in self.body)
        return tuple(
            Condition(text, m[2], m[1] is not None) if m else Condition(text, "", False) for text, m in matches
        )


def variables(text: str) -> frozenset[str]:
    """The names of the variables in a part of a rule."""
    return frozenset(_VARIABLE.findall(text))


def text_of(rules: Iterable[Rule]) -> str:
    """The text of a program, one rule a line."""
    return "".join(f"{rule}\n" for rule in rules)
