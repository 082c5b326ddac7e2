"""Language consistency by detection, where scripts cannot tell: English from French. Needs the extra `lang`.

lingua is only given the languages that a recipe names: all 75 take a gigabyte and half a minute. It judges sentence by
sentence, since short pieces are guesses. What needs no extra is style.language. Next: style.py.
"""

import re
from collections.abc import Sequence
from typing import Any

from posttrain.rewards.base import per_rollout
from posttrain.rewards.style import plain_text
from posttrain.schema import RewardFn, Rollout, Task

MIN_LETTERS = 20
"""Shorter sentences are not judged."""
MAX_CHARACTERS = 50_000


def detected(*, languages: Sequence[str]) -> RewardFn:
    """Share of letters in sentences of task.meta["language"], thinking included: 0 to 1.

    languages: those that can occur, by their English names. None if the task asks for none, or if no sentence is
    long enough to judge. Raises ValueError for a language that lingua does not know.
    """
    known = [name.lower() for name in languages]
    if len(set(known)) < 2:
        raise ValueError(f"languages={list(languages)}: detection needs two or more to choose from")
    detector = _Detector(known)

    @per_rollout
    def share(task: Task, rollout: Rollout) -> float | None:
        wanted = task.meta.get("language")
        if wanted is None:
            return None
        if str(wanted).lower() not in known:
            raise ValueError(f"task {task.id} asks for {wanted}; the reward knows {', '.join(known)}")
        if not rollout.text.strip() or len(rollout.text) > MAX_CHARACTERS:
            return 0.0
        return detector.share(rollout.text, str(wanted).lower())

    return share


class _Detector:
    """lingua for some languages, loaded when first needed."""

    def __init__(self, languages: Sequence[str]) -> None:
        lingua = _library()
        self._lingua = lingua
        try:
            self._languages = {name: getattr(lingua.Language, name.upper()) for name in languages}
        except AttributeError as error:
            raise ValueError(f"lingua does not know the language {str(error.name).lower()!r}") from None
        self._built: Any = None

    def share(self, text: str, wanted: str) -> float | None:
        if self._built is None:
            self._built = self._lingua.LanguageDetectorBuilder.from_languages(
                *self._languages.values()
            ).build()
        total = hits = 0
        for sentence in re.split(r"(?<=[.!?])\s+|[\n\u3002\uff01\uff1f]+", plain_text(text)):
            letters = sum(letter.isalpha() for letter in sentence)
            if letters >= MIN_LETTERS:
                total += letters
                hits += letters * (self._built.detect_language_of(sentence) == self._languages[wanted])
        return hits / total if total else None


def _library() -> Any:
    try:
        import lingua  # 96 MB, and an extra
    except ImportError:
        raise ValueError("this reward needs lingua; pip install 'posttrain[lang]'") from None
    return lingua
