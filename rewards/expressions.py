"""Arithmetic and algebra that a model wrote, judged without evaluating its text as Python.

Arithmetic is walked node by node in exact fractions. Algebra goes to sympy, whose parser is `eval`: the text
must first consist of known names, numbers and operators alone, and then is only parsed inside the sandbox.
"""

import ast
import functools
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

from posttrain.rewards.bubblewrap import Bubblewrap
from posttrain.rewards.sandbox import MIB, Call, Limits, Program

MAX_CHARACTERS = 400
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_ALGEBRA = re.compile(r"[A-Za-z]+|\d{1,12}(?:\.\d{1,12})?|[-+*/() ]")
_FUNCTIONS = frozenset("sin cos tan asin acos atan sinh cosh tanh exp log sqrt E pi".split())
_CHECK = """
import sympy

def check(relation, answer, target, variables):
    names = {name: sympy.Symbol(name) for name in variables}
    found, wanted = (sympy.parse_expr(text, local_dict=names) for text in (answer, target))
    if relation == "same":
        return bool(found == wanted)
    return bool(sympy.simplify(sympy.diff(found, names[variables[0]]) - wanted) == 0)
"""
_LIMITS = Limits(
    cpu_s=3.0, wall_s=6.0, memory_bytes=1024 * MIB, processes=4, output_bytes=1 << 16, disk_bytes=MIB
)


def arithmetic(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and integers of an expression of integers, + - * / and brackets; None if it is anything else.

    Example: arithmetic("(3 + 5) * 2 / 4") == (Fraction(4), [3, 5, 2, 4])
    """
    if len(text) > MAX_CHARACTERS or not re.fullmatch(r"[\d+\-*/() ]+", text):
        return None
    numbers: list[int] = []
    try:
        return _walk(ast.parse(text.strip(), mode="eval").body, numbers), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def related(
    relation: Literal["same", "antiderivative"], answer: str, target: str, variables: Sequence[str]
) -> bool:
    """Whether the answer is the same expression as the target, or has it as its derivative.

    Raises SandboxMissing where there is no sandbox, ChildProcessError if it breaks.
    """
    box = _box()  # first of all: without a sandbox even a wrong answer is not judged
    if not _is_algebra(answer, {*variables, "C"}):
        return False
    call = Call(function="check", args=(relation, answer, target, list(variables)))
    outcome = box.run(Program(source=_CHECK, call=call))
    if outcome.status == "error":
        raise ChildProcessError(outcome.note)
    return outcome.has_value and outcome.value is True


def _walk(node: ast.expr, numbers: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            numbers.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_walk(inner, numbers)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_walk(left, numbers), _walk(right, numbers))
    raise ValueError("not arithmetic")


def _is_algebra(text: str, names: set[str]) -> bool:
    """Whether a text is made of known names, numbers and operators: no strings, attributes or other names."""
    if not text.strip() or len(text) > MAX_CHARACTERS:
        return False
    pieces = _ALGEBRA.findall(text)
    words = {piece for piece in pieces if piece[0].isalpha()}
    return "".join(pieces) == text and words <= names | _FUNCTIONS


@functools.cache
def _box() -> Bubblewrap:
    return Bubblewrap(_LIMITS, warm=1, uses=64, packages=("sympy", "mpmath"), preload="import sympy")
