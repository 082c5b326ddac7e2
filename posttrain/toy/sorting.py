"""Sorting letters up or down.

Flaws: many demonstrations ignore the direction, some swap two neighbours or drop a letter.
"""

import random
from collections.abc import Iterator

from posttrain.schema import Message, Task

LETTERS = "abcdefghijklmnopqrst"
ALWAYS_UP = 0.4
SWAP = 0.15
DROP = 0.1


def tasks(*, seed: int, n: int) -> Iterator[Task]:
    """n tasks of five to seven distinct letters; id and split come from the question."""
    rng = random.Random(seed)
    for _ in range(n):
        letters = rng.sample(LETTERS, rng.randint(5, 7))
        direction = rng.choice(("up", "down"))
        question = f"sort these letters {direction} : {' '.join(letters)}"
        answer = " ".join(sorted(letters, reverse=direction == "down"))
        yield Task(
            id=question,
            domain="logic",
            messages=({"role": "user", "content": question},),
            answer=answer,
            thinking=False,
        )


def demonstrate(task: Task, rng: random.Random) -> list[Message]:
    """One flawed demonstration."""
    assert task.answer is not None
    letters = task.answer.split()
    if rng.random() < ALWAYS_UP:
        letters.sort()
    if rng.random() < SWAP:
        i = rng.randrange(len(letters) - 1)
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    if rng.random() < DROP:
        letters.pop(rng.randrange(len(letters)))
    return [{"role": "assistant", "content": f"answer {' '.join(letters)}"}]
