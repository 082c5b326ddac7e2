"""Running sums: tasks are reasoning-gym's `chain_sum`; the demonstrations think one step at a time.

Flaws: most demonstrations guess without thinking, and some thinking steps are wrong.
"""

import random

from posttrain.schema import Message, Task

LARGEST_TOTAL = 20
"""Every running total lies in 0 .. LARGEST_TOTAL, so that each is one token."""
GUESS = 0.55
"""Share of demonstrations that answer without thinking: right, but too hard to imitate."""
WRONG_STEP = 0.03
"""Share of thinking steps whose result is off by one or two."""


def terms(task: Task) -> list[int]:
    """The signed terms of the sum: "... 4 + 1 - 2 =" -> [4, 1, -2]."""
    expression = task.question.split(":")[1].split("=")[0].split()
    signs = [1, *(1 if op == "+" else -1 for op in expression[1::2])]
    return [sign * int(number) for sign, number in zip(signs, expression[::2], strict=True)]


def small_totals(task: Task) -> bool:
    """Whether every running total fits one token."""
    total = 0
    for term in terms(task):
        total += term
        if not 0 <= total <= LARGEST_TOTAL:
            return False
    return True


def demonstrate(task: Task, rng: random.Random) -> list[Message]:
    """One flawed demonstration."""
    first, *rest = terms(task)
    if rng.random() < GUESS:
        return [{"role": "assistant", "content": f"answer {first + sum(rest)}"}]
    steps, total = [], first
    for term in rest:
        result = total + term
        if rng.random() < WRONG_STEP:
            result = min(max(result + rng.choice((-2, -1, 1, 2)), 0), LARGEST_TOTAL)
        steps.append(f"{total} {'+' if term > 0 else '-'} {abs(term)} = {result}")
        total = result
    content = f"<think> {' ; '.join(steps)} </think> answer {total}"
    return [{"role": "assistant", "content": content}]
