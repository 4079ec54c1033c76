"""Why an atom holds, or does not: read off the rule instances that fired in the solver.

Every rule gets watchers. `fired(head, body)` holds when an instance fired; `blocked(head, body)` holds when an instance
stopped at its first false condition, which is then the last one in `body`. In a body, `yes(a)` says that the atom a is
in the model and `no(a)` that it is not, so negation as failure is part of the record. Nothing here recomputes anything.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import clingo

from stepladder.closedworld.prove import only_model
from stepladder.closedworld.rules import Rule, text_of, variables


class Finding(NamedTuple):
    """An atom somebody looked at, and whether it is in the model."""

    atom: clingo.Symbol
    holds: bool


@dataclass(frozen=True)
class Derivation:
    """The model of a program, with the conditions that settled each head."""

    atoms: frozenset[clingo.Symbol]
    settled: dict[clingo.Symbol, tuple[Finding, ...]]

    @property
    def answers(self) -> list[str]:
        return answers(sorted(self.atoms))

    def path(self, atom: str) -> list[Finding]:
        """All that was looked at to settle the atom, each once, causes before effects; the atom itself is last."""
        path: dict[clingo.Symbol, Finding] = {}
        self._walk(clingo.parse_term(atom), path, set())
        return list(path.values())

    def _walk(self, atom: clingo.Symbol, path: dict[clingo.Symbol, Finding], entered: set[clingo.Symbol]) -> None:
        if atom in entered:
            return
        entered.add(atom)
        for finding in self.settled.get(atom, ()):
            self._walk(finding.atom, path, entered)
        path[atom] = Finding(atom, atom in self.atoms)


def answers(model: Iterable[clingo.Symbol]) -> list[str]:
    """Every X with `answer(X)`, in the order of the model."""
    return [str(atom.arguments[0]) for atom in model if atom.match("answer", 1)]


def derive(rules: Iterable[Rule]) -> Derivation:
    """Solve a program together with its watchers. The program must have exactly one stable model."""
    rules = tuple(rules)
    model = only_model(text_of((*rules, *(watcher for rule in rules for watcher in _watchers(rule)))))
    watched = [atom for atom in model if atom.match("fired", 2) or atom.match("blocked", 2)]
    atoms = frozenset(model) - frozenset(watched)
    settled: dict[clingo.Symbol, tuple[Finding, ...]] = {}
    for watcher in watched:
        head, body = watcher.arguments
        # A blocked instance explains nothing about a head that another instance made true. Of several instances that
        # settle a head alike the first tells why; no family has two rules that could fail to give the same head.
        if (watcher.name == "fired") == (head in atoms):
            settled.setdefault(head, tuple(Finding(sign.arguments[0], sign.name == "yes") for sign in body.arguments))
    return Derivation(atoms, settled)


def _watchers(rule: Rule) -> Iterator[Rule]:
    passed: list[str] = []
    bound: frozenset[str] = frozenset()
    for number, condition in enumerate(rule.conditions):
        sign, opposite = ("no", "yes") if condition.negated else ("yes", "no")
        # "This condition is false" is only safe to say once everything in it has a value.
        if condition.atom and variables(rule.head) | condition.variables <= bound:
            against = condition.atom if condition.negated else f"not {condition.atom}"
            yield _watcher("blocked", rule, (*passed, f"{opposite}({condition.atom})"), (*rule.body[:number], against))
        if condition.atom:
            passed.append(f"{sign}({condition.atom})")
            bound |= frozenset() if condition.negated else condition.variables
    if passed:
        yield _watcher("fired", rule, tuple(passed), rule.body)


def _watcher(name: str, rule: Rule, signs: tuple[str, ...], body: tuple[str, ...]) -> Rule:
    # The trailing comma makes a tuple of one a tuple.
    return Rule(f"{name}({rule.head},({','.join(signs)},))", body)
