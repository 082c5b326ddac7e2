"""An agent world: follow a chain of relations with a lookup tool, one call a turn.

Every task has its own random facts, so the answer can only be found by calling the tool, reading the
result and using it in the next call. Flaws: some demonstrations answer without looking anything up,
stop after a part of the chain, or ask for the wrong relation.
"""

import random
from collections.abc import Iterator, Sequence

from posttrain.schema import Message, Task

RELATIONS = ("boss", "friend", "rival", "guide", "neighbor", "tutor", "cousin", "partner")
NAMES = (
    "ann bob cat dan eve fay gus hal ida jon kim leo mia ned ola pat quin roy sue tom una vic wes zoe"
).split()
NO_LOOKUP = 0.35
STOP_EARLY = 0.2
WRONG_RELATION = 0.04


def tasks(*, seed: int, n: int) -> Iterator[Task]:
    """n tasks with chains of three or four distinct relations."""
    rng = random.Random(seed)
    for _ in range(n):
        chain = rng.sample(RELATIONS, rng.choice((3, 4)))
        person = rng.choice(NAMES)
        facts = {r: dict(zip(NAMES, rng.choices(NAMES, k=len(NAMES)), strict=True)) for r in RELATIONS}
        answer = person
        for relation in chain:
            answer = facts[relation][answer]
        path = " of the ".join(reversed(chain))
        question = f"use the tool : who is the {path} of {person} ?"
        yield Task(
            id=question,
            domain="agent",
            messages=({"role": "user", "content": question},),
            answer=answer,
            thinking=False,
            meta={"chain": chain, "person": person, "facts": facts, "min_calls": len(chain)},
        )


def respond(task: Task, turn: str) -> str | None:
    """The tool: answers a call `<call> relation ( name ) </call>`; None when the turn is no call."""
    words = turn.split()
    if not words or words[0] != "<call>":
        return None
    match words:
        case ["<call>", relation, "(", name, ")", "</call>"] if name in task.meta["facts"].get(relation, {}):
            return f"{relation} of {name} is {task.meta['facts'][relation][name]}"
        case _:
            return "error"


def demonstrate(task: Task, rng: random.Random) -> list[Message]:
    """One flawed demonstration, tool results included."""
    chain: Sequence[str] = task.meta["chain"]
    if rng.random() < NO_LOOKUP:
        chain = ()
    elif rng.random() < STOP_EARLY:
        chain = chain[: rng.randint(1, len(chain) - 1)]
    messages: list[Message] = []
    person = task.meta["person"] if chain else rng.choice(NAMES)
    for relation in chain:
        if rng.random() < WRONG_RELATION:
            relation = rng.choice(RELATIONS)
        call = f"<call> {relation} ( {person} ) </call>"
        messages.append({"role": "assistant", "content": call})
        messages.append({"role": "tool", "content": respond(task, call)})
        person = task.meta["facts"][relation][person]
    return [*messages, {"role": "assistant", "content": f"answer {person}"}]
