"""One element-wise algorithm, written once: a Python function traced to an expression.

`trace` calls the function with symbols in place of arrays. Back ends turn the expression into
text of one fused loop (`text`) or, where a library only offers whole-array operations, into the
shortest list of passes (`lower`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

from narrows.core.errors import NarrowsError

OPERATORS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}


@dataclass(frozen=True, eq=False, slots=True)
class Expression:
    """A node. op: `arg` (value: which array), `const` (value: the number), or an operator."""

    op: str
    value: float = 0.0
    left: Expression | None = None
    right: Expression | None = None

    # numpy must not take a symbol for a scalar and spread it over an array
    __array_ufunc__ = None

    def __add__(self, other: Any) -> Expression:
        return _node("+", self, other)

    def __radd__(self, other: Any) -> Expression:
        return _node("+", other, self)

    def __sub__(self, other: Any) -> Expression:
        return _node("-", self, other)

    def __rsub__(self, other: Any) -> Expression:
        return _node("-", other, self)

    def __mul__(self, other: Any) -> Expression:
        return _node("*", self, other)

    def __rmul__(self, other: Any) -> Expression:
        return _node("*", other, self)

    def __truediv__(self, other: Any) -> Expression:
        return _node("/", self, other)

    def __rtruediv__(self, other: Any) -> Expression:
        return _node("/", other, self)

    def __neg__(self) -> Expression:
        return _node("-", 0.0, self)

    @property
    def sides(self) -> tuple[Expression, Expression]:
        """Both operands of an operator."""
        if self.left is None or self.right is None:
            raise NarrowsError(f"an expression {self.op!r} has no operands")
        return self.left, self.right

    def __bool__(self) -> bool:
        raise NarrowsError(
            "transform: the function branches on the value of an element, which cannot be traced; "
            "use + - * / of its arguments and numbers"
        )


def _wrap(value: Any) -> Expression:
    if isinstance(value, Expression):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise NarrowsError(
            f"transform: the function meets a {type(value).__name__}, which cannot be traced; "
            "use + - * / of its arguments and numbers"
        ) from None
    if not isfinite(number):
        raise NarrowsError(f"transform: constants must be finite, not {number}")
    return Expression("const", number)


def _node(op: str, left: Any, right: Any) -> Expression:
    return Expression(op, 0.0, _wrap(left), _wrap(right))


def trace(fn: Callable[..., Any], arguments: int) -> Expression:
    """The expression that `fn` computes of `arguments` elements.

    Raises NarrowsError where it does something else than + - * / of them and numbers.
    """
    try:
        return _wrap(fn(*(Expression("arg", i) for i in range(arguments))))
    except TypeError as error:
        raise NarrowsError(
            f"transform: the function cannot be traced with {arguments} arrays ({error}); "
            "use + - * / of its arguments and numbers"
        ) from None


def text(
    expression: Expression, element: str = "p{}[i]", numbers: list[float] | None = None
) -> str:
    """The expression in the syntax that C and Python share; `element` names an array's element.

    numbers: where given, constants become the names k0, k1, ... and are appended to it.
    """
    if expression.op == "arg":
        return element.format(int(expression.value))
    if expression.op == "const":
        if numbers is None:
            return f"({expression.value!r})"
        numbers.append(expression.value)
        return f"k{len(numbers) - 1}"
    left, right = expression.sides
    return f"({text(left, element, numbers)} {expression.op} {text(right, element, numbers)})"


Operand = tuple[str, float]
"""("arg", which), ("const", number) or ("scratch", which)."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One whole-array operation. to: number of a scratch array, -1 for the result.

    op: `copy`, one of OPERATORS' values, or `axpy`: left + factor * right.
    """

    op: str
    left: Operand
    right: Operand | None = None
    to: int = -1
    factor: float = 1.0

    @property
    def arrays(self) -> int:
        """Arrays that it reads and writes."""
        return 1 + sum(one is not None and one[0] != "const" for one in (self.left, self.right))


def lower(expression: Expression, axpy: bool = False) -> list[Pass]:
    """The passes of an expression; only the last writes the result, which may be an argument too.

    axpy: whether the library has left + factor * right as one operation.
    """
    passes: list[Pass] = []
    free: list[int] = []
    made = 0

    def operand(node: Expression) -> Operand:
        nonlocal made
        if node.op in ("arg", "const"):
            return node.op, node.value
        step = operation(node)
        if free:
            to = free.pop()
        else:
            to, made = made, made + 1
        passes.append(Pass(step.op, step.left, step.right, to, step.factor))
        return "scratch", float(to)

    def operation(node: Expression) -> Pass:
        left, right = node.sides
        used: list[Operand] = []
        if axpy and node.op == "+" and left.op != "const" and _scaled(right):
            number, other = right.sides
            if number.op != "const":
                number, other = other, number
            used = [operand(left), operand(other)]
            step = Pass("axpy", used[0], used[1], factor=number.value)
        else:
            used = [operand(left), operand(right)]
            step = Pass(OPERATORS[node.op], used[0], used[1])
        free.extend(int(number) for kind, number in used if kind == "scratch")
        return step

    if expression.op in ("arg", "const"):
        return [Pass("copy", (expression.op, expression.value))]
    passes.append(operation(expression))
    return passes


def _scaled(node: Expression) -> bool:
    """Whether a node is a number times something that is none."""
    return node.op == "*" and (node.sides[0].op == "const") != (node.sides[1].op == "const")
