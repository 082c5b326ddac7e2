"""The form of an answer: thinking tags, length, language."""

import re
import unicodedata

from posttrain.rewards.base import bounded, per_rollout
from posttrain.schema import RewardFn, Rollout, Task

_WORD = re.compile(r"[^\W\d_]+")
SCRIPTS = {
    "latin": ("LATIN",),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "thai": ("THAI",),
    "hangul": ("HANGUL",),
    "han": ("CJK",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
}
"""Name in task.meta["script"] -> first words of the Unicode names of its letters."""


@bounded
@per_rollout
def format_ok(task: Task, rollout: Rollout) -> float:
    """1 if the text ended by itself and, at most one closed <think> block apart, says something.

    A task with thinking = False must have no <think> at all.
    """
    text = rollout.text
    opened, closed = text.count("<think>"), text.count("</think>")
    if rollout.stop != "eos" or opened != closed or opened > (1 if task.thinking else 0):
        return 0.0
    if opened and text.index("</think>") < text.index("<think>"):
        return 0.0
    return float(bool(_outside_thinking(text).strip()))


def length_penalty(*, target: int, limit: int) -> RewardFn:
    """0 up to `target` sampled tokens, falling in a straight line to -1 at `limit` and beyond."""
    if not 0 <= target < limit:
        raise ValueError(f"target={target}, limit={limit}: need 0 <= target < limit")

    @bounded
    @per_rollout
    def penalty(task: Task, rollout: Rollout) -> float:
        return -min(1.0, max(0.0, (rollout.num_sampled - target) / (limit - target)))

    return penalty


@bounded
@per_rollout
def language(task: Task, rollout: Rollout) -> float | None:
    """Share of words in the wanted language, thinking left out: 0 to 1.

    By task.meta["lexicon"], a list of words, or else task.meta["script"], a name in SCRIPTS, where a
    word counts if all its letters are of the script. None if the task asks for neither.
    """
    words = _WORD.findall(_outside_thinking(rollout.text))
    if "lexicon" in task.meta:
        known = {word.lower() for word in task.meta["lexicon"]}
        hits = [word.lower() in known for word in words]
    elif "script" in task.meta:
        prefixes = _script(task)
        hits = [all(unicodedata.name(c, "").startswith(prefixes) for c in word) for word in words]
    else:
        return None
    return sum(hits) / len(hits) if hits else 0.0


def _script(task: Task) -> tuple[str, ...]:
    name = task.meta["script"]
    if name not in SCRIPTS:
        raise ValueError(f"task {task.id}: unknown script {name!r}; known: {', '.join(SCRIPTS)}")
    return SCRIPTS[name]


def _outside_thinking(text: str) -> str:
    """What is not inside <think> ... </think>; an unclosed block reaches to the end."""
    return re.sub(r"<think>.*?(?:</think>|\Z)", " ", text, flags=re.DOTALL)
