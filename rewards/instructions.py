"""Instructions that code can verify, in the manner of IFEval (arXiv 2311.07911); kinds, names and code are our own.

task.meta["instructions"] lists what the answer must obey, each {"kind": ..., and the kind's own keys}. Where a kind counts,
"at_least", "at_most" and "exactly" say how many. Only what follows the thinking is looked at; an empty or
overlong answer obeys nothing. Words are compared in small letters.

    keywords        words            every one of them occurs          forbidden    words       none of them does
    keyword_count   word, a count    as a whole word                   letter_count letter, a count
    words           a count          sentences, paragraphs   a count   paragraph_starts  paragraph (1 = first), word
    bullets         a count          lines beginning with - or *       numbered     a count     lines with 1. 2. 3.
    headings        a count          lines beginning with #            highlights   a count     *marked* pieces
    title           the first line is <<like this>>                    placeholders a count     [like this]
    postscript      marker           a last paragraph begins so        json         all of it; keys: must be there
    case            "upper" "lower"  of all letters                    capital_words a count    words all in capitals
    without         characters       none of them occurs               starts_with, ends_with   text
    quoted          all in double quotes                               choice       options     it is one of them
    repeats_prompt  text             it begins with the text itself    parts        separator, a count
    script          script, share    share of words in it (style.py)   line_length  a count     of every line, in characters
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.rewards.base import bounded, per_rollout
from posttrain.rewards.style import share_in_script
from posttrain.schema import Rollout, Task

MAX_CHARACTERS = 20_000
Rule = Mapping[str, Any]

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|[\u3002\uff01\uff1f]+")


@bounded
@per_rollout
def strict(task: Task, rollout: Rollout) -> float:
    """1 if every instruction is obeyed, else 0."""
    return float(all(_obeyed(task, rollout)))


@bounded
@per_rollout
def mean(task: Task, rollout: Rollout) -> float:
    """Share of the instructions obeyed."""
    found = _obeyed(task, rollout)
    return sum(found) / len(found)


def _obeyed(task: Task, rollout: Rollout) -> list[bool]:
    rules = task.meta.get("instructions")
    if not isinstance(rules, list) or not rules:
        raise ValueError(f"task {task.id} has no instructions (a list in meta)")
    return [_check(task, rule, rollout.text) for rule in rules]


def _check(task: Task, rule: Rule, text: str) -> bool:
    check = _CHECKS.get(str(rule.get("kind")))
    if check is None:
        raise ValueError(
            f"task {task.id}: unknown instruction {rule.get('kind')!r}; known: {', '.join(_CHECKS)}"
        )
    text = "" if "<think>" in text and "</think>" not in text else text.rpartition("</think>")[2].strip()
    try:
        obeyed = check(rule, text if len(text) <= MAX_CHARACTERS else "")
    except (KeyError, TypeError) as error:
        raise ValueError(f"task {task.id}: instruction {dict(rule)}: {error!r}") from None
    return bool(text) and len(text) <= MAX_CHARACTERS and obeyed


def _counts(rule: Rule, number: int) -> bool:
    """Whether a number is as the rule wants it."""
    bounds = {"at_least", "at_most", "exactly"} & rule.keys()
    if not bounds:
        raise KeyError("at_least, at_most or exactly")
    low, high = rule.get("at_least", number), rule.get("at_most", number)
    return bool(low <= number <= high and rule.get("exactly", number) == number)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _has(text: str, word: str) -> int:
    """How often a word, or several, occurs as such."""
    return len(re.findall(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()))


def _paragraphs(text: str) -> list[str]:
    return [piece.strip() for piece in re.split(r"\n[ \t]*\n", text) if piece.strip()]


def _lines(text: str, pattern: str) -> int:
    return sum(re.match(pattern, line) is not None for line in text.splitlines())


def _sentences(text: str) -> int:
    """Ends of sentences, and what stands after the last one."""
    ends = list(_SENTENCE_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return len(ends) + bool(_WORD.search(rest))


def _keywords(rule: Rule, text: str) -> bool:
    return all(_has(text, word) for word in rule["words"])


def _forbidden(rule: Rule, text: str) -> bool:
    return not any(_has(text, word) for word in rule["words"])


def _paragraph_starts(rule: Rule, text: str) -> bool:
    paragraphs, wanted = _paragraphs(text), int(rule["paragraph"])
    words = _words(paragraphs[wanted - 1]) if 1 <= wanted <= len(paragraphs) else []
    return bool(words) and words[0] == str(rule["word"]).lower()


def _title(rule: Rule, text: str) -> bool:
    first = text.splitlines()[0].strip() if text else ""
    return re.fullmatch(r"<<[^<>\n]*[^<>\s][^<>\n]*>>", first) is not None


def _postscript(rule: Rule, text: str) -> bool:
    paragraphs = _paragraphs(text)
    last, marker = (paragraphs[-1] if len(paragraphs) > 1 else ""), str(rule["marker"])
    return last.startswith(marker) and bool(last.removeprefix(marker).strip())


def _json(rule: Rule, text: str) -> bool:
    body = re.sub(r"\A```(?:json)?\n(.*)\n```\Z", r"\1", text, flags=re.DOTALL)
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return False
    keys = set(rule.get("keys", ()))
    return isinstance(found, dict | list) and (not keys or (isinstance(found, dict) and keys <= found.keys()))


def _case(rule: Rule, text: str) -> bool:
    wanted = {"upper": text.upper(), "lower": text.lower()}[rule["case"]]
    return text == wanted and any(letter.isalpha() for letter in text)


def _quoted(rule: Rule, text: str) -> bool:
    return len(text) > 2 and (text[0], text[-1]) in (('"', '"'), ("\u201c", "\u201d"))


def _choice(rule: Rule, text: str) -> bool:
    return text.rstrip(".") in [str(option).rstrip(".") for option in rule["options"]]


def _repeats_prompt(rule: Rule, text: str) -> bool:
    prompt = str(rule["text"]).strip()
    return text.startswith(prompt) and bool(text.removeprefix(prompt).strip())


def _parts(rule: Rule, text: str) -> bool:
    pieces = text.split(str(rule["separator"]))
    return all(piece.strip() for piece in pieces) and _counts(rule, len(pieces))


def _script(rule: Rule, text: str) -> bool:
    share = share_in_script(text, str(rule["script"]))
    return share is not None and share >= float(rule.get("share", 0.95))


_CHECKS: dict[str, Callable[[Rule, str], bool]] = {
    "keywords": _keywords,
    "forbidden": _forbidden,
    "keyword_count": lambda rule, text: _counts(rule, _has(text, str(rule["word"]))),
    "letter_count": lambda rule, text: _counts(rule, text.lower().count(str(rule["letter"]).lower())),
    "words": lambda rule, text: _counts(rule, len(_words(text))),
    "sentences": lambda rule, text: _counts(rule, _sentences(text)),
    "paragraphs": lambda rule, text: _counts(rule, len(_paragraphs(text))),
    "paragraph_starts": _paragraph_starts,
    "bullets": lambda rule, text: _counts(rule, _lines(text, r"\s*[-*] +\S")),
    "numbered": lambda rule, text: _counts(rule, _lines(text, r"\s*\d+[.)] +\S")),
    "headings": lambda rule, text: _counts(rule, _lines(text, r"#{1,6} +\S")),
    "highlights": lambda rule, text: _counts(rule, len(re.findall(r"(?<!\*)\*[^*\s][^*\n]*\*(?!\*)", text))),
    "title": _title,
    "placeholders": lambda rule, text: _counts(rule, len(re.findall(r"\[[^\[\]\n]+\]", text))),
    "postscript": _postscript,
    "json": _json,
    "case": _case,
    "capital_words": lambda rule, text: _counts(
        rule, sum(word.isupper() and len(word) > 1 for word in _WORD.findall(text))
    ),
    "without": lambda rule, text: not set(str(rule["characters"])) & set(text),
    "starts_with": lambda rule, text: text.startswith(str(rule["text"])),
    "ends_with": lambda rule, text: text.endswith(str(rule["text"])),
    "quoted": _quoted,
    "choice": _choice,
    "repeats_prompt": _repeats_prompt,
    "parts": _parts,
    "script": _script,
    "line_length": lambda rule, text: _counts(rule, max(map(len, text.splitlines()), default=0)),
}
