"""The clingo side: a program proves exactly one option, or is refused with the reason.

`prove` runs in this process and is for programs we wrote ourselves. Grounding cannot be interrupted and may take all
the memory there is, so a program that came with a user's file goes to `prove_untrusted`: this same file, run as a
script in a child process that limits itself before it reads a byte. So it imports nothing from the package.
"""

import json
import math
import re
import resource
import subprocess
import sys

import clingo

# Checked in the text, because clingo opens an #include while it parses; a comment or a string can only make us refuse
# too much. Optimisation is refused because it hides the stable models that are not the best.
_REFUSED = re.compile(r"#\s*(script|include|minimi[sz]e|maximi[sz]e)|:~", re.IGNORECASE)
# clingo's integers wrap silently at 32 bits. Four digits leave room for the product of any two numbers.
_LARGEST = 9999
_LARGE = re.compile(r"\d{5}|\b0[xob]|\*\*")


class Unproved(Exception):
    """The program does not prove exactly one option; the message says why."""


def prove(program: str) -> int:
    """The number i of the only `opt(i)` that holds in every stable model of our own program."""
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
    """What the program shows, sorted, if all its stable models show the same.

    Any message from clingo refuses the program: an undefined atom or a division by zero is only logged, and the
    rule it stands in is dropped without a word.
    """
    _refuse(program)
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
        # What was small in the text may have grown while grounding.
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


def prove_untrusted(program: str, seconds: float, mebibytes: int) -> int:
    """`prove` for a program somebody else wrote, in a child that may use this much time and memory and open no file."""
    _refuse(program)
    stopped = f"stopped by its limits of {seconds:g} s and {mebibytes} MiB"
    try:
        # -I: nothing in the working directory can be imported. No environment: the child needs none of our keys.
        child = subprocess.run(  # noqa: S603
            [sys.executable, "-I", __file__, str(math.ceil(seconds)), str(mebibytes)],
            input=program.encode("ascii"),
            capture_output=True,
            check=False,
            timeout=seconds,
            env={},
        )
    except subprocess.TimeoutExpired as error:
        raise Unproved(stopped) from error
    if child.returncode < 0:
        raise Unproved(stopped)
    if child.returncode > 0:
        raise Unproved(f"the solver failed: {child.stderr.decode(errors='replace').strip()[-300:]}")
    verdict = json.loads(child.stdout)
    if "unproved" in verdict:
        raise Unproved(verdict["unproved"])
    return int(verdict["option"])


def _refuse(program: str) -> None:
    """Refuse, before clingo sees it, what it must not parse."""
    if not program.isascii() or "\0" in program:
        raise Unproved("programs are ASCII: clingo's logger crashes on anything else")
    if found := _REFUSED.search(program):
        raise Unproved(f"{found[0]} is refused: a program is facts, rules and #show")
    if found := _LARGE.search(program):
        raise Unproved(f"{found[0]} is refused: integers above {_LARGEST} may wrap silently")


def _child(seconds: int, mebibytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    # stdin, stdout and stderr are open; there is no fourth.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    try:
        verdict: dict[str, int | str] = {"option": prove(sys.stdin.read())}
    except Unproved as reason:
        verdict = {"unproved": str(reason)}
    print(json.dumps(verdict))


if __name__ == "__main__":
    _child(int(sys.argv[1]), int(sys.argv[2]))
