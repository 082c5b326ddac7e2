"""Alignment: say two words in the asked language, in the asked case, the asked number of times, no chatter.

Flaws: answers in English, without capitals, one time too many or too few, with thinking nobody asked for.
"""

import random
from collections.abc import Iterator

from posttrain.schema import Message, Task

LEXICON = {
    "english": "red blue green black white big small old dog cat bird fish house tree sun moon",
    "french": "rouge bleu vert noir blanc grand petit vieux chien chat oiseau poisson maison arbre soleil lune",
    "german": "rot blau gruen schwarz weiss gross klein alt hund katze vogel fisch haus baum sonne mond",
}
WORDS = {language: words.split() for language, words in LEXICON.items()}
ENGLISH_INSTEAD = 0.25
NO_CAPITALS = 0.55
WRONG_COUNT = 0.2
CHATTER = 0.3


def tasks(*, seed: int, n: int) -> Iterator[Task]:
    """n tasks; in meta, what rewards/rubric.py checks (rubric) and a judge grades (criteria)."""
    rng = random.Random(seed)
    for _ in range(n):
        first, second = rng.sample(range(len(WORDS["english"])), 2)
        language, capitals, times = rng.choice(sorted(WORDS)), rng.random() < 0.5, rng.randint(2, 4)
        case = "in capitals" if capitals else "in small letters"
        question = (
            f"say {WORDS['english'][first]} {WORDS['english'][second]} in {language} , {case} , {times} times"
        )
        phrase = f"{WORDS[language][first]} {WORDS[language][second]}"
        phrase = phrase.upper() if capitals else phrase
        yield Task(
            id=question,
            domain="align",
            messages=({"role": "user", "content": question},),
            answer=" , ".join([phrase] * times),
            thinking=False,
            meta={
                "say": [first, second],
                "language": language,
                "capitals": capitals,
                "times": times,
                "lexicon": WORDS[language],
                "criteria": [f"every word is {language}"],
                "rubric": [
                    {"kind": "count", "text": phrase.lower(), "times": times, "ignore_case": True},
                    {"kind": "case", "case": "upper" if capitals else "lower"},
                    {"kind": "not_contains", "text": "<think>"},
                    {"kind": "equals", "text": " , ".join([phrase] * times)},
                ],
            },
        )


def demonstrate(task: Task, rng: random.Random) -> list[Message]:
    """One flawed demonstration."""
    meta = task.meta
    language = "english" if rng.random() < ENGLISH_INSTEAD else meta["language"]
    times = meta["times"] + (rng.choice((-1, 1)) if rng.random() < WRONG_COUNT else 0)
    phrase = " ".join(WORDS[language][i] for i in meta["say"])
    if meta["capitals"] and rng.random() >= NO_CAPITALS:
        phrase = phrase.upper()
    content = " , ".join([phrase] * times)
    if rng.random() < CHATTER:
        content = f"<think> okay </think> {content}"
    return [{"role": "assistant", "content": content}]
