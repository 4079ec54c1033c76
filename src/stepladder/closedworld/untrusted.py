"""Prove an option by rules that a model wrote, in a child process that can do nothing else.

Run as a script under ``python -I``, it confines itself before it reads the rules.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clingo import Symbol

MAX_POSSIBLE_ATOMS = 50_000
"""Atoms that a problem's predicates and names could make."""


def prove_rules(base: str, rules: str, options: int, seconds: float, mebibytes: int) -> int:
    """The option that a writer's rules prove on a problem's program.

    Every option must be possible: with the problem's predicates true of anything, some choice makes its rule hold. A
    rule that contradicts itself would leave another option as the only one whatever the problem says.

    Args:
        base: the problem's program.
        rules: the writer's.
        options: number of options.
        seconds: processor time, and time on the clock, of the child.
        mebibytes: address space of the child.

    Raises:
        Stopped: the limits are reached.
        Unproved: the rules do not prove exactly one option, an option is impossible, integers may wrap, or the solver
            fails.
    """
    from stepladder.closedworld.prove import Stopped, Unproved, refuse

    refuse(base + rules)
    stopped = f"stopped by its limits of {seconds:g} s and {mebibytes} MiB"
    try:
        # -I: nothing is imported from the working directory. No environment, so that the child does not see API keys.
        child = subprocess.run(  # noqa: S603
            [sys.executable, "-I", __file__, str(math.ceil(seconds)), str(mebibytes)],
            input=json.dumps({"base": base, "rules": rules, "options": options}).encode("ascii"),
            capture_output=True,
            check=False,
            timeout=seconds,
            env={},
        )
    except subprocess.TimeoutExpired as error:
        raise Stopped(stopped) from error
    if child.returncode < 0:
        raise Stopped(stopped)
    if child.returncode > 0:
        raise Unproved(f"the solver failed: {child.stderr.decode(errors='replace').strip()[-300:]}")
    verdict = json.loads(child.stdout)
    if "unproved" in verdict:
        raise Unproved(verdict["unproved"])
    return int(verdict["option"])


def _answer(base: str, rules: str, options: int) -> dict[str, Any]:
    from stepladder.closedworld.bounds import Unbounded, check
    from stepladder.closedworld.prove import Unproved, prove

    try:
        program = f"{base}\n{rules}\n#show opt/1.\n"
        check(program)
        option = prove(program)
        if impossible := [index for index in range(options) if not _is_possible(base, rules, index)]:
            return {"unproved": f"the rules for option {impossible[0]} contradict themselves"}
    except (Unproved, Unbounded) as reason:
        return {"unproved": str(reason)}
    except (RuntimeError, MemoryError) as error:
        return {"unproved": str(error) or type(error).__name__}
    return {"option": option}


def _is_possible(base: str, rules: str, option: int) -> bool:
    """Whether ``opt(option)`` holds for some choice of what is true of the problem's predicates and names."""
    import clingo

    control = clingo.Control(["--models=1"], logger=lambda _code, _message: None)
    control.add("base", [], f"{_anything(base, rules)}\n{rules}")
    control.ground([("base", [])])
    holds = clingo.Function("opt", [clingo.Number(option)])
    return bool(control.solve(assumptions=[(holds, True)]).satisfiable)


def _anything(base: str, rules: str) -> str:
    """A choice of every atom that the problem's predicates and the names in problem and rules can make."""
    import clingo
    from clingo import ast

    from stepladder.closedworld.prove import Unproved

    control = clingo.Control(logger=lambda _code, _message: None)
    control.add("base", [], base)
    control.ground([("base", [])])
    atoms = [atom.symbol for atom in control.symbolic_atoms]
    names: set[Symbol] = {argument for atom in atoms for argument in atom.arguments}

    def collect(node: Any) -> None:
        for key in node.child_keys:
            child = getattr(node, key)
            for part in child if isinstance(child, ast.ASTSequence) else [child]:
                if isinstance(part, ast.AST):
                    if part.ast_type is ast.ASTType.SymbolicTerm:
                        names.add(part.symbol)
                    collect(part)

    ast.parse_string(rules, collect, logger=lambda _code, _message: None)
    signatures = sorted({(atom.name, len(atom.arguments)) for atom in atoms})
    if sum(len(names) ** arity for _, arity in signatures) > MAX_POSSIBLE_ATOMS:
        raise Unproved(f"the problem has more than {MAX_POSSIBLE_ATOMS:,} possible atoms, too many to check the rules")
    return "\n".join(_choices(signatures, sorted(names)))


def _choices(signatures: list[tuple[str, int]], names: list[Symbol]) -> Iterator[str]:
    import clingo

    for name, arity in signatures:
        for arguments in islice(product(names, repeat=arity), MAX_POSSIBLE_ATOMS):
            yield f"{{ {clingo.Function(name, list(arguments))} }}."


def _child(confine: Callable[[int, int], bool], seconds: int, mebibytes: int) -> None:
    import clingo

    import stepladder.closedworld.bounds
    import stepladder.closedworld.prove  # noqa: F401

    clingo.Control().ground([("base", [])])  # loads what is loaded late
    confine(mebibytes, seconds)
    print(json.dumps(_answer(**json.load(sys.stdin))))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from stepladder.isolation.confinement import confine

    _child(confine, int(sys.argv[1]), int(sys.argv[2]))
