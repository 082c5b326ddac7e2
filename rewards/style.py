"""The form of an answer: thinking tags, length, language."""

import re
import unicodedata

from posttrain.rewards.base import bounded, per_rollout
from posttrain.schema import RewardFn, Rollout, Task

_EACH = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Kana and Han, written without blanks: every character counts as a word."""
_WORD = re.compile(rf"[{_EACH}]|[^\W\d_{_EACH}]+")
_NOT_PROSE = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$.{,500}?\$\$|\$[^$\n]*\$|\\\[.{,500}?\\\]|\\\(.{,500}?\\\)|\\[a-zA-Z]+|https?://\S+|</?\w+>",
    re.DOTALL,
)
"""Code, LaTeX, addresses and tags are in no language. Formulas are bounded, or a text of openings would take minutes."""
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
    """1 if the text ended by itself and every turn, at most one closed <think> block apart, says something.

    A task with thinking = False must have no <think> at all.
    """
    turns = [str(m["content"]) for m in rollout.messages if m["role"] == "assistant"] or [rollout.text]
    return float(rollout.stop == "eos" and all(_well_formed(turn, task.thinking) for turn in turns))


def length_penalty(*, target: int, limit: int) -> RewardFn:
    """0 up to `target` sampled tokens, falling in a straight line to -1 at `limit` and beyond.

    DAPO's soft punishment of overlong answers (arXiv 2503.14476, Eq. 13), where limit - target is the cache. Forms
    that depend on correctness are in length.py.
    """
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
    word counts if all its letters are of the script. Code, LaTeX and addresses do not count. None if the task asks
    for neither.
    """
    return _language(task, _outside_thinking(rollout.text))


@bounded
@per_rollout
def language_throughout(task: Task, rollout: Rollout) -> float | None:
    """Like language, the thinking included: DeepSeek-R1 (arXiv 2501.12948, 2.3.2) takes the share over it."""
    return _language(task, rollout.text)


def share_in_script(text: str, script: str) -> float | None:
    """Share of words whose letters are all of a script; None where there is no word.

    Raises ValueError for a script that is not in SCRIPTS.
    """
    if script not in SCRIPTS:
        raise ValueError(f"unknown script {script!r}; known: {', '.join(SCRIPTS)}")
    words = _WORD.findall(plain_text(text))
    hits = [all(unicodedata.name(c, "").startswith(SCRIPTS[script]) for c in word) for word in words]
    return sum(hits) / len(hits) if hits else None


def plain_text(text: str) -> str:
    """The text without code, LaTeX, addresses and tags."""
    return _NOT_PROSE.sub(" ", text)


def _language(task: Task, text: str) -> float | None:
    if "lexicon" in task.meta:
        known = {word.lower() for word in task.meta["lexicon"]}
        hits = [word.lower() in known for word in _WORD.findall(plain_text(text))]
        return sum(hits) / len(hits) if hits else 0.0
    if "script" not in task.meta:
        return None
    try:
        return share_in_script(text, task.meta["script"]) or 0.0
    except ValueError as error:
        raise ValueError(f"task {task.id}: {error}") from None


def _well_formed(text: str, thinking: bool) -> bool:
    opened, closed = text.count("<think>"), text.count("</think>")
    if opened != closed or opened > (1 if thinking else 0):
        return False
    if opened and text.index("</think>") < text.index("<think>"):
        return False
    return bool(_outside_thinking(text).strip())


def _outside_thinking(text: str) -> str:
    """What is not inside <think> ... </think>; an unclosed block reaches to the end."""
    return re.sub(r"<think>.*?(?:</think>|\Z)", " ", text, flags=re.DOTALL)
