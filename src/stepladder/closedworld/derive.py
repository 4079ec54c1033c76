"""Why an atom holds, or does not, from the rule instances that fired in the solver.

Watcher rules are added to every rule. `fired(head, body)` holds when an instance of the rule fired; `blocked(head,
body)` holds when an instance had a false condition, the first of which is the last one in `body`. In a body, `yes(a)`
says that the atom a is in the model and `no(a)` that it is not, so that negation as failure is recorded too. All of it
is computed by the solver.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import clingo

from stepladder.closedworld.prove import only_model
from stepladder.closedworld.rules import Rule, text_of, variables


class CheckedAtom(NamedTuple):
    """An atom that a rule's condition tests, and whether it is in the model."""

    atom: clingo.Symbol
    holds: bool


@dataclass(frozen=True)
class Derivation:
    """The model of a program, and for each head the conditions that made it true or false."""

    atoms: frozenset[clingo.Symbol]
    reasons: dict[clingo.Symbol, tuple[CheckedAtom, ...]]

    @property
    def answers(self) -> list[str]:
        return answers(sorted(self.atoms))

    def path(self, atom: str) -> list[CheckedAtom]:
        """All atoms that decide whether ``atom`` holds, each once, causes before effects; the atom itself is last."""
        path: dict[clingo.Symbol, CheckedAtom] = {}
        self._walk(clingo.parse_term(atom), path, set())
        return list(path.values())

    def _walk(self, atom: clingo.Symbol, path: dict[clingo.Symbol, CheckedAtom], entered: set[clingo.Symbol]) -> None:
        if atom in entered:
            return
        entered.add(atom)
        for checked in self.reasons.get(atom, ()):
            self._walk(checked.atom, path, entered)
        path[atom] = CheckedAtom(atom, atom in self.atoms)


def answers(model: Iterable[clingo.Symbol]) -> list[str]:
    """Every X with `answer(X)`, in the order of the model."""
    return [str(atom.arguments[0]) for atom in model if atom.match("answer", 1)]


def derive(rules: Iterable[Rule]) -> Derivation:
    """Solve a program together with its watchers.

    Raises:
        Unproved: the program does not have exactly one stable model, or clingo refuses it.
    """
    rules = tuple(rules)
    model = only_model(text_of((*rules, *(watcher for rule in rules for watcher in _watchers(rule)))))
    watched = [atom for atom in model if atom.match("fired", 2) or atom.match("blocked", 2)]
    atoms = frozenset(model) - frozenset(watched)
    reasons: dict[clingo.Symbol, tuple[CheckedAtom, ...]] = {}
    for watcher in watched:
        head, body = watcher.arguments
        # A blocked instance does not explain a head that another instance made true. Of several instances that explain
        # a head the first is taken; no family has two rules that could both fail to give the same head.
        if (watcher.name == "fired") == (head in atoms):
            signs = body.arguments
            reasons.setdefault(head, tuple(CheckedAtom(sign.arguments[0], sign.name == "yes") for sign in signs))
    return Derivation(atoms, reasons)


def _watchers(rule: Rule) -> Iterator[Rule]:
    passed: list[str] = []
    bound: frozenset[str] = frozenset()
    for number, condition in enumerate(rule.conditions):
        sign, opposite = ("no", "yes") if condition.negated else ("yes", "no")
        # A watcher for a false condition is a safe rule only once all its variables are bound.
        if condition.atom and variables(rule.head) | condition.variables <= bound:
            negation = condition.atom if condition.negated else f"not {condition.atom}"
            yield _watcher("blocked", rule, (*passed, f"{opposite}({condition.atom})"), (*rule.body[:number], negation))
        if condition.atom:
            passed.append(f"{sign}({condition.atom})")
            bound |= frozenset() if condition.negated else condition.variables
    if passed:
        yield _watcher("fired", rule, tuple(passed), rule.body)


def _watcher(name: str, rule: Rule, signs: tuple[str, ...], body: tuple[str, ...]) -> Rule:
    # With the trailing comma, a single sign is a tuple too.
    return Rule(f"{name}({rule.head},({','.join(signs)},))", body)
