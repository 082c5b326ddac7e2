"""A Python interpreter as a tool: questions whose answers want computing.

Every call is a program of its own in a fresh sandbox; nothing is kept between calls. Difficulty: `level` 1 to 3 makes the
numbers larger, until they cannot be found in the head.
Used as tasks = "py://posttrain.envs.interpreter:tasks?n=1000&level=2", environment =
"posttrain.envs.interpreter:start", rewards = [{ fn = "posttrain.rewards.tools:outcome" }]. Next: sandboxed.py.
"""

import inspect
from collections.abc import Callable, Iterator
from random import Random
from typing import Annotated, Any

from pydantic import Field

from posttrain.envs import sandboxed
from posttrain.rewards.sandbox import Limits, Program
from posttrain.rollouts import toolbox
from posttrain.rollouts.deepseek_chat import Call
from posttrain.rollouts.environment import Policy, play
from posttrain.schema import Message, Task

MAX_TURNS = 20
"""V3.2's cold-start prompt for code allows 20 executions (report, Table 8)."""
LIMITS = Limits(cpu_s=5, wall_s=10)
POLICY = "Use the interpreter to compute what is asked. End with the word answer and the number alone."


class Interpreter:
    """One episode: a tool that runs programs."""

    def __init__(self) -> None:
        self.programs = 0

    def python(self, code: Annotated[str, Field(max_length=20_000, description="a Python program")]) -> str:
        """Run a program of Python's standard library and give what it prints. Nothing is kept between calls."""
        self.programs += 1
        return sandboxed.report(sandboxed.run(Program(source=code), LIMITS))

    def step(self, text: str) -> list[str] | None:
        """As Episode.step."""
        return toolbox.respond((self.python,), text)

    def outcome(self) -> dict[str, Any]:
        """How many programs were run."""
        return {"programs": self.programs}

    def close(self) -> None:
        """Nothing is held."""


def start(task: Task, seed: int) -> Interpreter:
    """An episode; raises Unavailable where code cannot be isolated."""
    sandboxed.sandbox()
    return Interpreter()


def tasks(*, seed: int, n: int, level: int = 1) -> Iterator[Task]:
    """n questions of a level; raises ValueError for a level that does not exist."""
    if level not in (1, 2, 3):
        raise ValueError(f"level={level}: known are 1, 2, 3")
    rng = Random(seed)
    tools = toolbox.schemas(Interpreter().python)
    for _ in range(n):
        question, function, arguments = rng.choice(_KINDS)(rng, 10**level)
        yield Task(
            id="",
            domain="",
            messages=(
                {"role": "system", "content": POLICY, "tools": tools},
                {"role": "user", "content": question},
            ),
            answer=str(function(*arguments)),
            meta={"program": _program(function, arguments), "min_calls": 1},
        )


def solver(task: Task) -> Policy:
    """Runs the program that computes the answer."""
    return toolbox.script([Call("python", {"code": task.meta["program"]})], f"answer {task.answer}")


def demonstrate(task: Task, rng: Random) -> list[Message]:
    """The solver's conversation, for a first supervised training."""
    return list(play(start, task, solver(task), seed=0, max_turns=MAX_TURNS).messages)


def _program(function: Callable[..., int], arguments: tuple[Any, ...]) -> str:
    source = inspect.getsource(function)
    return f"{source}\n\nprint({function.__name__}({', '.join(map(repr, arguments))}))\n"


# ---- the functions; their source is what the solver sends, so they use nothing from around them ----


def sum_of_primes(limit: int) -> int:
    """Sum of the primes below the limit."""
    sieve = bytearray([1]) * limit
    sieve[:2] = b"\0\0"
    for i in range(2, int(limit**0.5) + 1):
        if sieve[i]:
            sieve[i * i :: i] = bytes(len(range(i * i, limit, i)))
    return sum(i for i in range(limit) if sieve[i])


def digit_sum(base: int, exponent: int) -> int:
    """Sum of the decimal digits of a power."""
    return sum(map(int, str(base**exponent)))


def divisible(low: int, high: int, a: int, b: int) -> int:
    """Numbers from low to high that exactly one of a and b divides."""
    return sum((i % a == 0) != (i % b == 0) for i in range(low, high + 1))


def recurrence(steps: int, a: int, b: int, modulus: int) -> int:
    """x_steps of x_0 = 0, x_1 = 1, x_n = a x_(n-1) + b x_(n-2), modulo."""
    x, y = 0, 1
    for _ in range(steps):
        x, y = y, (a * y + b * x) % modulus
    return x


def longest_chain(limit: int) -> int:
    """The start below the limit with the longest chain of halving and 3 n + 1, the smallest of these."""
    best, best_length = 1, 0
    for start in range(1, limit):
        number, length = start, 0
        while number != 1:
            number = number // 2 if number % 2 == 0 else 3 * number + 1
            length += 1
        if length > best_length:
            best, best_length = start, length
    return best


_Kind = tuple[str, Callable[..., int], tuple[Any, ...]]


def _primes(rng: Random, size: int) -> _Kind:
    limit = rng.randint(5 * size, 20 * size)
    return f"What is the sum of all primes below {limit}?", sum_of_primes, (limit,)


def _digits(rng: Random, size: int) -> _Kind:
    base, exponent = rng.randint(3, 99), rng.randint(2 * size // 5, size)
    return (
        f"What is the sum of the decimal digits of {base} to the power {exponent}?",
        digit_sum,
        (base, exponent),
    )


def _divisible(rng: Random, size: int) -> _Kind:
    low = rng.randint(1, 10 * size)
    high, (a, b) = low + rng.randint(10 * size, 100 * size), rng.sample(range(2, 30), 2)
    question = (
        f"How many of the numbers from {low} to {high} are divisible by {a} or by {b}, but not by both?"
    )
    return question, divisible, (low, high, a, b)


def _recurrence(rng: Random, size: int) -> _Kind:
    steps, a, b, modulus = (
        rng.randint(size, 10 * size),
        rng.randint(2, 9),
        rng.randint(1, 9),
        rng.randint(50, 999),
    )
    question = (
        f"Let x_0 = 0, x_1 = 1 and x_n = {a} x_(n-1) + {b} x_(n-2). What is x_{steps} modulo {modulus}?"
    )
    return question, recurrence, (steps, a, b, modulus)


def _chain(rng: Random, size: int) -> _Kind:
    limit = rng.randint(2 * size, 10 * size)
    question = (
        "From n go to n / 2 if n is even, else to 3 n + 1, until 1. "
        f"Which start below {limit} takes the most steps, the smallest if there are several?"
    )
    return question, longest_chain, (limit,)


_KINDS = (_primes, _digits, _divisible, _recurrence, _chain)
