"""Whether a logic program's integers can wrap: clingo computes with 32 bits and says nothing when they overflow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from clingo import SymbolType, ast

MAX_ATOM_INTEGER = 9_999
"""Integers in atoms; larger ones are refused (closedworld/prove.py)."""
MAX_COMPUTED = 2**31 - 1
MAX_ELEMENTS = 100_000
"""Elements of an aggregate, as far as time and memory allow more than a few."""

SUMS = (ast.AggregateFunction.Sum, ast.AggregateFunction.SumPlus)


class Unbounded(Exception):
    """An expression of the program may wrap; the message shows it."""


def check(program: str) -> None:
    """Raises:
    Unbounded: an arithmetic expression may leave 32 bits, its variables taken at their largest.
    RuntimeError: the program cannot be parsed.
    """
    statements: list[Any] = []
    ast.parse_string(program, statements.append, logger=lambda _code, _message: None)
    for statement in statements:
        largest = _variables(statement)
        for node in _walk(statement):
            if node.ast_type in (ast.ASTType.BinaryOperation, ast.ASTType.UnaryOperation):
                _largest(node, largest)
            elif node.ast_type is ast.ASTType.BodyAggregate and node.function in SUMS:
                weights = [_largest(element.terms[0], largest) for element in node.elements if element.terms]
                if max(weights, default=0) * MAX_ELEMENTS > MAX_COMPUTED:
                    raise Unbounded(f"the sum {node} may wrap silently")


def _variables(statement: Any) -> dict[str, float]:
    """The largest absolute value of every variable that has one: from atoms that must hold, and from assignments."""
    largest: dict[str, float] = {}
    assigned: list[tuple[str, Any]] = []
    for node in _walk(statement):
        if node.ast_type is not ast.ASTType.Literal and node.ast_type is not ast.ASTType.BodyAggregate:
            continue
        if node.ast_type is ast.ASTType.BodyAggregate:
            guards = [guard for guard in (node.left_guard, node.right_guard) if guard is not None]
            for name in (guard.term.name for guard in guards if guard.term.ast_type is ast.ASTType.Variable):
                largest[name] = MAX_COMPUTED
        elif node.atom.ast_type is ast.ASTType.SymbolicAtom and node.sign == ast.Sign.NoSign:
            for term in _walk(node.atom):
                if term.ast_type is ast.ASTType.Variable:
                    largest[term.name] = max(largest.get(term.name, 0), MAX_ATOM_INTEGER)
        elif node.atom.ast_type is ast.ASTType.Comparison and node.sign == ast.Sign.NoSign:
            terms = [node.atom.term, *(guard.term for guard in node.atom.guards)]
            assigned += [
                (term.name, other)
                for term in terms
                if term.ast_type is ast.ASTType.Variable
                for other in terms
                if other is not term
            ]
    for _ in range(len(assigned)):  # one may need another that stands behind it
        for name, term in assigned:
            try:
                value = _largest(term, largest)
            except Unbounded:
                if not _names(term) <= largest.keys():
                    continue
                raise
            largest[name] = max(largest.get(name, 0), value)
    return largest


def _names(term: Any) -> set[str]:
    return {node.name for node in _walk(term) if node.ast_type is ast.ASTType.Variable}


def _largest(term: Any, largest: dict[str, float]) -> float:
    """The largest absolute value of a term's integer; 0 where it has none.

    Raises:
        Unbounded: it may leave 32 bits.
    """
    value = _value(term, largest)
    if value > MAX_COMPUTED:
        raise Unbounded(f"{term} may wrap silently")
    return value


def _value(term: Any, largest: dict[str, float]) -> float:
    value: float = 0
    match term.ast_type:
        case ast.ASTType.SymbolicTerm if term.symbol.type is SymbolType.Number:
            value = abs(term.symbol.number)
        case ast.ASTType.Variable:
            value = largest.get(term.name, math.inf)
        case ast.ASTType.UnaryOperation:
            value = _largest(term.argument, largest) + 1  # ~x is -x - 1
        case ast.ASTType.Interval:
            value = max(_largest(term.left, largest), _largest(term.right, largest))
        case ast.ASTType.Pool:
            value = max((_largest(argument, largest) for argument in term.arguments), default=0)
        case ast.ASTType.BinaryOperation:
            value = _computed(term.operator_type, _largest(term.left, largest), _largest(term.right, largest))
    return value


def _computed(operation: int, left: float, right: float) -> float:
    """The largest absolute value that an operation on integers up to ``left`` and ``right`` gives."""
    if operation == ast.BinaryOperator.Multiplication:
        return left * right
    if operation in (ast.BinaryOperator.Plus, ast.BinaryOperator.Minus):
        return left + right
    if operation in (ast.BinaryOperator.Division, ast.BinaryOperator.Modulo):
        return max(left, right)
    if operation in (ast.BinaryOperator.XOr, ast.BinaryOperator.Or, ast.BinaryOperator.And):
        return 2 * max(left, right) + 1
    return math.inf  # powers


def _walk(node: Any) -> Iterator[Any]:
    """A node and all below it."""
    if isinstance(node, ast.AST):
        yield node
        for key in node.child_keys:
            yield from _walk(getattr(node, key))
    elif isinstance(node, ast.ASTSequence):
        for part in node:
            yield from _walk(part)
