"""A corpus to search: pages with facts, a BM25 index over words and Chinese pairs of characters.

From a .jsonl or .parquet file with rows {"title", "text", "facts": [{"relation", "target"}]}, where a target is the
title of another page or a plain name, and facts may be missing; or made up:
made://en?seed=3&pages=400. Left out: stemming, and corpora that do not fit into memory. Next: wiki.py.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from posttrain import table_file

_WORDS = re.compile(r"[^\W_]+")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]+")


@dataclass(frozen=True, slots=True)
class Page:
    """One document. Example: Page("Mira Kalvo", "Mira Kalvo was born in Torun.", (("birthplace", "Torun"),))."""

    title: str
    text: str
    facts: tuple[tuple[str, str], ...] = ()
    """(relation, title or name)."""


class Corpus:
    """Pages by number and title, with search."""

    def __init__(self, pages: Sequence[Page]) -> None:
        """Raises ValueError if there is no page, two have the same title, or bm25s is missing."""
        self.pages = list(pages)
        self._numbers = {page.title: i for i, page in enumerate(self.pages)}
        if not self.pages or len(self._numbers) < len(self.pages):
            raise ValueError(f"a corpus needs pages with different titles; got {len(self.pages)} pages")
        self._index = _index([terms(f"{page.title} {page.text}") for page in self.pages])

    def search(self, query: str, limit: int) -> list[int]:
        """Numbers of the best pages by (score, number); pages without any of the words are left out."""
        known = [term for term in terms(query) if term in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        best = np.lexsort((np.arange(len(scores)), -scores))[:limit]
        return [int(i) for i in best if scores[i] > 0]

    def facts(self, title: str) -> tuple[tuple[str, str], ...]:
        """The facts of a page; none where there is no such page."""
        number = self._numbers.get(title)
        return () if number is None else self.pages[number].facts

    def number(self, title: str) -> int:
        """The number of a page."""
        return self._numbers[title]


@functools.cache  # the episodes of a process share it
def load(source: str) -> Corpus:
    """The corpus at a path or made:// address; raises ValueError if it cannot be read or made."""
    if not source.startswith("made://"):
        return Corpus([_page(row, at) for at, row in table_file.rows(source)])
    parts = urlsplit(source)
    options = dict(parse_qsl(parts.query))
    return Corpus(_made(parts.netloc, Random(options["seed"]), int(options["pages"])))


def terms(text: str) -> list[str]:
    """What is indexed: words in small letters, and of Han characters every pair of neighbours.

    Example: terms("The \u957f\u6c5f\u6865") == ["the", "\u957f\u6c5f", "\u6c5f\u6865"]
    """
    found = []
    for word in _WORDS.findall(_HAN.sub(lambda m: f" {m[0]} ", text.lower())):
        if _HAN.fullmatch(word) and len(word) > 1:
            found += [word[i : i + 2] for i in range(len(word) - 1)]
        else:
            found.append(word)
    return found


def _index(pages: Sequence[list[str]]) -> Any:
    try:
        import bm25s  # an extra
    except ImportError:
        raise ValueError("a corpus needs bm25s; pip install 'posttrain[tasks]'") from None
    index = bm25s.BM25()
    index.index(list(pages), show_progress=False)
    return index


def _page(row: dict[str, Any], where: str) -> Page:
    title, text, facts = row.get("title"), row.get("text"), row.get("facts") or ()
    if not isinstance(title, str) or not isinstance(text, str):
        raise ValueError(f"{where}: a page needs title and text")
    try:
        pairs = tuple((str(fact["relation"]), str(fact["target"])) for fact in facts)
    except (KeyError, TypeError):
        raise ValueError(f"{where}: facts must be a list of {{relation, target}}") from None
    return Page(title, text, pairs)


# ---- an encyclopedia of a world that does not exist ----

_FACTS = (
    # kind of page, kind of target, then per language: relation and sentence
    (
        "person",
        "town",
        ("birthplace", "{0} was born in {1}."),
        ("\u51fa\u751f\u5730", "{0}\u751f\u4e8e{1}\u3002"),
    ),
    ("person", "person", ("teacher", "{0} learned from {1}."), ("\u8001\u5e08", "{0}\u5e08\u4ece{1}\u3002")),
    (
        "book",
        "person",
        ("author", "{0} was written by {1}."),
        ("\u4f5c\u8005", "{0}\u7531{1}\u6240\u5199\u3002"),
    ),
    (
        "town",
        "person",
        ("founder", "{0} was founded by {1}."),
        ("\u521b\u5efa\u8005", "{0}\u7531{1}\u521b\u5efa\u3002"),
    ),
    ("town", "river", ("river", "{0} lies on {1}."), ("\u6cb3\u6d41", "{0}\u4f4d\u4e8e{1}\u7554\u3002")),
    (
        "guild",
        "town",
        ("seat", "{0} has its seat in {1}."),
        ("\u6240\u5728\u5730", "{0}\u8bbe\u5728{1}\u3002"),
    ),
    ("guild", "person", ("master", "{0} is led by {1}."), ("\u4f1a\u957f", "{0}\u7531{1}\u9886\u5bfc\u3002")),
)
_LANGUAGES = ("en", "zh")
_FILLER = ("{0} is sometimes confused with {1}.", "\u6709\u4eba\u628a{0}\u8bef\u8ba4\u4e3a{1}\u3002")
_SHARES = {"person": 0.4, "town": 0.25, "book": 0.2, "guild": 0.1, "river": 0.05}
_NAMES = {
    # Families and places are made of syllables; the second part tells the kind.
    "en": {
        "syllables": "ka tor vel mi ran ost bel dru fen gal hal ith jor lun mor nes pel quin ras sel tam ulm vor wen".split(),
        "person": "{first} {name}",
        "town": "{name} Town",
        "book": "The Book of {name}",
        "guild": "Guild of {name}",
        "river": "{name} River",
    },
    "zh": {
        "syllables": list("\u5b89\u767d\u6210\u5927\u4e1c\u65b9\u9ad8\u548c\u9ec4\u91d1\u5170\u6797\u6885\u5b81\u5e73\u6e05\u77f3\u6c34\u6587\u897f\u96ea\u4e91\u7389\u6b63"),
        "person": "{name}{first}",
        "town": "{name}\u9547",
        "book": "\u300a{name}\u300b",
        "guild": "{name}\u884c\u4f1a",
        "river": "{name}\u6cb3",
    },
}  # fmt: skip


def _made(language: str, rng: Random, pages: int) -> list[Page]:
    if language not in _LANGUAGES or pages < 20:
        raise ValueError(
            f"made://{language}?pages={pages}: languages are {', '.join(_LANGUAGES)}, pages at least 20"
        )
    which = _LANGUAGES.index(language)
    titles = {
        kind: _titles(kind, language, max(2, int(share * pages)), rng) for kind, share in _SHARES.items()
    }
    every = [title for names in titles.values() for title in names]
    made = []
    for kind, names in titles.items():
        for title in names:
            facts, sentences = [], [_FILLER[which].format(title, rng.choice(every)) for _ in range(2)]
            for source, target_kind, *texts in _FACTS:
                if source == kind:
                    relation, sentence = texts[which]
                    target = rng.choice(titles[target_kind])
                    facts.append((relation, target))
                    sentences.append(sentence.format(title, target))
            rng.shuffle(sentences)
            made.append(Page(title, ("" if language == "zh" else " ").join(sentences), tuple(facts)))
    rng.shuffle(made)
    return made


def _titles(kind: str, language: str, count: int, rng: Random) -> list[str]:
    """Different titles of a kind."""
    names = _NAMES[language]
    found: dict[str, None] = {}
    for _ in range(100 * count):
        name = "".join(rng.choices(names["syllables"], k=rng.choice((2, 3))))
        first = "".join(rng.choices(names["syllables"], k=2))
        found[str(names[kind]).format(name=name.capitalize(), first=first.capitalize())] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"cannot make {count} different names of kind {kind}; ask for fewer pages")
