"""An agent world: find a page by a word on it, then follow what pages say to other pages, one call a turn.

Every task has a corpus of its own, so the answer can only be found by searching, reading and going on. `search` is the BM25
index of ../envs/corpus.py. Flaws: some demonstrations answer without looking anything up, stop after a part of
the chain, or go to a wrong name on the page.
"""

import functools
import random
from collections.abc import Iterator
from typing import Any

from posttrain.envs.corpus import Corpus, Page
from posttrain.schema import Message, Task
from posttrain.toy.lookup import NAMES, RELATIONS
from posttrain.toy.phrases import WORDS

THINGS = [word for word in WORDS["english"] if word not in NAMES]
"""One of them stands on each page, which makes it the page to be found."""
FACTS = 4
"""Relations on a page."""
NO_LOOKUP = 0.35
STOP_EARLY = 0.2
WRONG_NAME = 0.04


class Reader:
    """One episode: two tools on the task's pages."""

    def __init__(self, pages: tuple[Page, ...]) -> None:
        self.pages = {page.title: page for page in pages}
        self.opened: list[str] = []

    def step(self, text: str) -> list[str] | None:
        """The title that `<call> search word </call>` finds, the page of `<call> open name </call>`; None is no call."""
        words = text.split()
        if not words or words[0] != "<call>":
            return None
        match words:
            case ["<call>", "search", word, "</call>"]:
                corpus = _corpus(tuple(self.pages.values()))
                found = corpus.search(word, 1)
                return [corpus.pages[found[0]].title if found else "error"]
            case ["<call>", "open", name, "</call>"] if name in self.pages:
                self.opened.append(name)
                return [self.pages[name].text]
            case _:
                return ["error"]

    def outcome(self) -> dict[str, Any]:
        """The pages opened."""
        return {"opened": self.opened}

    def close(self) -> None:
        """Nothing is held."""


def start(task: Task, seed: int) -> Reader:
    """An episode of the task; nothing in it is random."""
    return Reader(tuple(Page(title, text) for title, text in task.meta["pages"].items()))


def tasks(*, seed: int, n: int) -> Iterator[Task]:
    """n tasks over two or three pages."""
    rng = random.Random(seed)
    for _ in range(n):
        things = rng.sample(THINGS, len(THINGS))
        people = rng.sample(NAMES, len(THINGS))
        facts = {name: dict(_facts(people, name, rng)) for name in people}
        pages = {
            name: " ".join([thing, *(word for fact in facts[name].items() for word in fact)])
            for name, thing in zip(people, things, strict=True)
        }
        chain, path = _walk(facts, rng.choice((2, 3)), rng)
        thing = pages[path[0]].split()[0]
        question = f"use search : who is the {' of the '.join(reversed(chain))} of the {thing} ?"
        yield Task(
            id=question,
            domain="agent",
            messages=({"role": "user", "content": question},),
            answer=path[-1],
            thinking=False,
            meta={"pages": pages, "thing": thing, "path": path, "min_calls": len(path)},
        )


def demonstrate(task: Task, rng: random.Random) -> list[Message]:
    """One flawed demonstration, results included."""
    pages, path = task.meta["pages"], list(task.meta["path"])
    if rng.random() < NO_LOOKUP:
        return [{"role": "assistant", "content": f"answer {rng.choice(list(pages))}"}]
    if rng.random() < STOP_EARLY:
        path = path[: rng.randint(2, len(path) - 1)] if len(path) > 2 else path
    calls = [(f"search {task.meta['thing']}", path[0])]
    for name in path[:-1]:
        if rng.random() < WRONG_NAME:
            name = rng.choice(list(pages))
        calls.append((f"open {name}", pages[name]))
    messages: list[Message] = []
    for call, result in calls:
        messages.append({"role": "assistant", "content": f"<call> {call} </call>"})
        messages.append({"role": "tool", "content": result})
    return [*messages, {"role": "assistant", "content": f"answer {path[-1]}"}]


def _walk(facts: dict[str, dict[str, str]], length: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Different relations, and the different people on the way."""
    while True:
        chain, path = list[str](), [rng.choice(list(facts))]
        while len(chain) < length:
            onward = [(r, n) for r, n in facts[path[-1]].items() if r not in chain and n not in path]
            if not onward:
                break
            relation, name = rng.choice(onward)
            chain.append(relation)
            path.append(name)
        else:
            return chain, path


def _facts(people: list[str], name: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Relations to different other people."""
    others = [other for other in people if other != name]
    yield from zip(rng.sample(RELATIONS, FACTS), rng.sample(others, FACTS), strict=True)


@functools.lru_cache(maxsize=512)  # the rollouts of a task share it
def _corpus(pages: tuple[Page, ...]) -> Corpus:
    return Corpus(pages)
