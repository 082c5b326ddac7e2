"""Search and open over a local corpus: questions whose answer takes facts from several pages.

The corpus is a file of yours (corpus.py says what is in it) or an encyclopedia of a world that does not
exist, so that nothing can be known by heart. A question follows `hops` facts from page to page. Difficulty: hops,
pages, language ("en" or "zh").
Used as tasks = "py://posttrain.envs.wiki:tasks?n=1000&hops=3", environment = "posttrain.envs.wiki:start",
rewards = [{ fn = "posttrain.rewards.tools:outcome" }]. Next: corpus.py.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Annotated, Any

from pydantic import Field

from posttrain.envs.corpus import Corpus, load
from posttrain.rollouts import toolbox
from posttrain.rollouts.deepseek_chat import Call
from posttrain.rollouts.environment import Policy, play
from posttrain.rollouts.toolbox import ToolError
from posttrain.schema import Message, Task

MAX_TURNS = 20
POLICY = (
    "Find the answer with the tools; you cannot know it. Search for a name, open pages, follow what they say to "
    "other pages. End with the word answer and the name asked for, as the page writes it."
)
_QUESTION = {
    # What is the <last relation> of the ... of <page>?
    "en": ("What is {} of {}?", "the {}", " of "),
    # <page> de <first relation> de ... <last relation> shi shenme?
    "zh": ("{1}\u7684{0}\u662f\u4ec0\u4e48\uff1f", "{}", "\u7684"),
}


class Library:
    """One episode: two tools on a corpus that no episode can change."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.opened: list[int] = []

    def search(
        self,
        query: Annotated[str, Field(max_length=500, description="words to look for")],
        limit: Annotated[int, Field(ge=1, le=10, description="pages at most")] = 5,
    ) -> str:
        """The pages that fit a query best: number, title and beginning of each."""
        found = self.corpus.search(query, limit)
        pages = (f"{i}. {self.corpus.pages[i].title}: {self.corpus.pages[i].text[:80]}" for i in found)
        return "\n".join(pages) or "nothing found"

    def open(self, page: Annotated[int, Field(description="number of a page")]) -> str:
        """The whole text of a page."""
        if not 0 <= page < len(self.corpus.pages):
            raise ToolError(f"there is no page {page}")
        self.opened.append(page)
        return f"{self.corpus.pages[page].title}\n{self.corpus.pages[page].text}"

    def step(self, text: str) -> list[str] | None:
        """As Episode.step."""
        return toolbox.respond((self.search, self.open), text)

    def outcome(self) -> dict[str, Any]:
        """The numbers of the pages opened."""
        return {"opened": self.opened}

    def close(self) -> None:
        """The corpus is shared and stays."""


def start(task: Task, seed: int) -> Library:
    """An episode over the task's corpus."""
    return Library(load(task.meta["corpus"]))


def tasks(
    *, seed: int, n: int, hops: int = 2, pages: int = 400, language: str = "en", corpus: str = ""
) -> Iterator[Task]:
    """n questions over `hops` facts each, on a file or on a made-up encyclopedia of about `pages` pages.

    Raises ValueError for unknown settings and for a corpus without such chains of facts.
    """
    if language not in _QUESTION:
        raise ValueError(f"language={language!r}: known are {', '.join(_QUESTION)}")
    if hops < 1:
        raise ValueError(f"hops={hops}: need at least 1")
    source = corpus or f"made://{language}?seed={seed}&pages={pages}"
    library = load(source)
    rng, made, tries = Random(seed), 0, 0
    while made < n:
        tries += 1
        if tries > 100 * n + 1000:
            raise ValueError(
                f"{source}: found {made} questions over {hops} facts in {tries} tries, {n} wanted"
            )
        path = _walk(library, hops, rng)
        if path is not None:
            made += 1
            yield _task(library, source, path, language)


def solver(task: Task) -> Policy:
    """Searches for every name on the way, opens its page, and answers."""
    calls = []
    for title, page in task.meta["path"]:
        calls += [Call("search", {"query": title, "limit": 10}), Call("open", {"page": page})]
    return toolbox.script(calls, f"answer {task.answer}")


def demonstrate(task: Task, rng: Random) -> list[Message]:
    """The solver's conversation, for a first supervised training."""
    return list(play(start, task, solver(task), seed=0, max_turns=MAX_TURNS).messages)


def _walk(library: Corpus, hops: int, rng: Random) -> list[tuple[str, str]] | None:
    """(title, relation) of every step and (answer, ""), all titles different; None where the way ends early."""
    title = rng.choice(library.pages).title
    path: list[tuple[str, str]] = []
    for _ in range(hops):
        facts = library.facts(title)
        if not facts:
            return None
        relation, target = rng.choice(facts)
        path.append((title, relation))
        title = target
    path.append((title, ""))
    return path if len({title for title, _ in path}) == len(path) else None


def _task(library: Corpus, source: str, path: Sequence[tuple[str, str]], language: str) -> Task:
    frame, word, joint = _QUESTION[language]
    relations = [word.format(relation) for _, relation in path[:-1]]
    chain = joint.join(relations if language == "zh" else reversed(relations))
    question = frame.format(chain, path[0][0])
    library_tools = Library(library)
    tools = toolbox.schemas(library_tools.search, library_tools.open)
    return Task(
        id="",
        domain="",
        messages=(
            {"role": "system", "content": POLICY, "tools": tools},
            {"role": "user", "content": question},
        ),
        answer=path[-1][0],
        meta={
            "corpus": source,
            "path": [(title, library.number(title)) for title, _ in path[:-1]],
            "min_calls": 1,
            "script": "latin",
        },
    )
