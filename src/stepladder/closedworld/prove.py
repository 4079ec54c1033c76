"""Run clingo: a program proves exactly one option, or is refused with the reason.

What runs here is for generated programs: grounding cannot be interrupted and may take all memory. A program that a
model wrote goes to :mod:`stepladder.closedworld.untrusted`.
"""

import re

import clingo

# Matched in the program's text, because clingo opens an #include while it parses; a match in a comment or a string is
# refused too. Optimisation is refused because it hides stable models that are not optimal.
_REFUSED = re.compile(r"#\s*(script|include|minimi[sz]e|maximi[sz]e)|:~", re.IGNORECASE)
# clingo's integers wrap silently at 32 bits. Four digits leave room for the product of any two numbers.
_LARGEST = 9999
_LARGE = re.compile(r"\d{5}|\b0[xob]|\*\*")


class Unproved(Exception):
    """The program does not prove exactly one option; the message says why."""


class Stopped(Unproved):
    """The limits of time or memory were reached."""


def prove(program: str) -> int:
    """The number i of the only `opt(i)` that holds in every stable model of a trusted program.

    Raises:
        Unproved: there is no such i.
    """
    shown = only_model(program)
    if len(shown) != 1:
        raise Unproved(f"{len(shown)} atoms are shown; exactly one opt(i) must hold")
    option = shown[0]
    if not option.match("opt", 1) or option.arguments[0].type is not clingo.SymbolType.Number:
        raise Unproved(f"{option} is shown, not an opt(i)")
    if option.arguments[0].number < 0:
        raise Unproved(f"{option} is not the number of an option")
    return option.arguments[0].number


def only_model(program: str) -> list[clingo.Symbol]:
    """The atoms that the program shows, sorted, if all its stable models show the same.

    Raises:
        Unproved: they do not, or there is no stable model, or clingo logged anything: it only logs an undefined atom or
            a division by zero, and silently drops the rule.
    """
    refuse(program)
    messages: list[str] = []
    models: list[list[clingo.Symbol]] = []
    try:
        control = clingo.Control(
            ["--project=show", "--models=2"], logger=lambda _code, message: messages.append(message.strip())
        )
        control.add("base", [], program)
        control.ground([("base", [])])
        with control.solve(yield_=True) as handle:
            models.extend(sorted(model.symbols(shown=True)) for model in handle)
        # Grounding may compute integers that are larger than those in the text.
        large = [text for atom in control.symbolic_atoms if _LARGE.search(text := str(atom.symbol))]
    except (RuntimeError, MemoryError) as error:
        raise Unproved(" ".join([*messages, str(error) or type(error).__name__])) from error
    if messages:
        raise Unproved(" ".join(messages))
    if large:
        raise Unproved(f"{large[0]} holds an integer above {_LARGEST}")
    if len(models) != 1:
        raise Unproved("there is no stable model" if not models else "there is more than one projected stable model")
    return models[0]


def refuse(program: str) -> None:
    """Raise Unproved for a program that clingo must not parse."""
    if not program.isascii() or "\0" in program:
        raise Unproved("programs are ASCII: clingo's logger crashes on anything else")
    if match := _REFUSED.search(program):
        raise Unproved(f"{match[0]} is refused: a program is facts, rules and #show")
    if match := _LARGE.search(program):
        raise Unproved(f"{match[0]} is refused: integers above {_LARGEST} may wrap silently")
