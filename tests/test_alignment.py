"""Instructions, lengths and languages: every kind with answers that obey and answers that do not."""

import math
import time
from typing import Any

import numpy as np
import pytest
from test_rewards import rollout, task

from posttrain.rewards import instructions, length, style
from posttrain.rewards.base import load_reward
from posttrain.schema import RewardFn

OBEYED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "keywords": ({"words": ["Red", "blue sky"]}, ["a red, blue sky"], ["reddish blue sky", "red sky"]),
    "forbidden": ({"words": ["red"]}, ["reddish", "blue"], ["so Red!"]),
    "keyword_count": ({"word": "red", "exactly": 2}, ["red, RED."], ["red", "red red red", "reddish red"]),
    "letter_count": ({"letter": "e", "at_least": 2, "at_most": 3}, ["bEe", "eee"], ["be", "eeee"]),
    "words": ({"at_least": 2, "at_most": 3}, ["don't go", "a b c"], ["well-known", "a b c d", "... !"]),
    "sentences": ({"exactly": 2}, ["One. Two?", "One! And so", "\u597d\u3002\u597d\uff01"], ["One", "A. B. C.", "3.14"]),
    "paragraphs": ({"exactly": 2}, ["a\n\nb", "a\n \n\n\nb\nc"], ["a", "a\nb", "a\n\nb\n\nc"]),
    "paragraph_starts": ({"paragraph": 2, "word": "So"}, ["a\n\nso, b"], ["so", "so\n\na", "a\n\nsome"]),
    "bullets": ({"exactly": 2}, ["- a\n- b", "x\n* a\n  * b"], ["- a", "-a\n-b", "- \n- "]),
    "numbered": ({"exactly": 2}, ["1. a\n2. b", "1) a\n2) b"], ["1. a", "1.a\n2.b"]),
    "headings": ({"at_least": 1}, ["# A\ntext", "x\n### B"], ["text", "#A", "####### x"]),
    "highlights": ({"exactly": 1}, ["so *very* nice"], ["none", "*a* *b*", "**bold**", "* item"]),
    "title": ({}, ["<<A tale>>\ntext"], ["<A tale>", "text\n<<A>>", "<<  >>", "<<A>> and"]),
    "placeholders": ({"at_least": 2}, ["[name], [city]"], ["[name]", "[]  [x", "[a\nb] [c]"]),
    "postscript": ({"marker": "P.S."}, ["a\n\nP.S. b"], ["P.S. b", "a P.S. b", "a\n\nP.S."]),
    "json": ({"keys": ["a"]}, ['{"a": 1}', '```json\n{"a": 1, "b": 2}\n```'], ['{"b": 1}', "[1]", "3", '{"a": 1} ok', "{a: 1}"]),
    "case": ({"case": "lower"}, ["all small, 1"], ["Not small", "123"]),
    "capital_words": ({"exactly": 1}, ["a BIG thing"], ["a big thing", "A BIG BAD thing", "I am"]),
    "without": ({"characters": ",;"}, ["a b."], ["a, b", "a; b"]),
    "starts_with": ({"text": "Dear"}, ["Dear you"], ["dear you", "My Dear"]),
    "ends_with": ({"text": "Bye."}, ["x Bye."], ["Bye", "Bye. x"]),
    "quoted": ({}, ['"a b"', "\u201ca\u201d"], ["a", '"a', '""']),
    "choice": ({"options": ["Yes.", "No."]}, ["Yes.", "No"], ["yes", "Yes and No", "maybe"]),
    "repeats_prompt": ({"text": "Why? "}, ["Why? Since."], ["Why?", "Since. Why?"]),
    "parts": ({"separator": "***", "exactly": 2}, ["a ***b"], ["a", "a***b***c", "a***"]),
    "script": ({"script": "han"}, ["\u4f60\u597d, 12"], ["\u4f60 hello", "12"]),
    "line_length": ({"at_most": 3}, ["abc\nab"], ["abcd", "a\nabcd"]),
}  # fmt: skip


def test_every_kind_is_tested() -> None:
    assert OBEYED.keys() == instructions._CHECKS.keys()
    assert len(OBEYED) >= 15


@pytest.mark.parametrize("kind", OBEYED)
def test_instructions_are_obeyed_or_not(kind: str) -> None:
    keys, good, bad = OBEYED[kind]
    given = task(meta={"instructions": [{"kind": kind, **keys}]})
    junk = ["", " ", "<think> " + good[0], "<think>" + good[0] + "</think>", good[0] + " " * 3 + "x" * 20_000]
    for reward in (instructions.strict, instructions.mean):
        assert reward(given, [rollout(text) for text in good]) == [1.0] * len(good)
        assert reward(given, [rollout(f"<think>hm</think>{text}") for text in good]) == [1.0] * len(good)
        assert reward(given, [rollout(text) for text in bad + junk]) == [0.0] * len(bad + junk)


def test_mean_is_the_share_and_strict_wants_all() -> None:
    rules = [{"kind": "case", "case": "lower"}, {"kind": "words", "exactly": 1}]
    given = task(meta={"instructions": rules})
    texts = [rollout(text) for text in ("a", "a b", "A B")]
    assert instructions.mean(given, texts) == [1, 0.5, 0]
    assert instructions.strict(given, texts) == [1, 0, 0]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, "has no instructions"),
        ({"instructions": [{"kind": "vibes"}]}, "unknown instruction 'vibes'; known: keywords"),
        ({"instructions": [{"kind": "keywords"}]}, "instruction .*'words'"),
        ({"instructions": [{"kind": "words"}]}, "at_least, at_most or exactly"),
        ({"instructions": [{"kind": "script", "script": "elvish"}]}, "unknown script 'elvish'"),
    ],
)
def test_a_bad_instruction_is_the_authors_fault(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instructions.strict(task(meta=meta), [rollout("a")])


@pytest.mark.parametrize(
    "piece", ["a ", "*a", "[", "- a\n", "\n \n", "a.", "<<", "'a-", "\u0301", '"[{', "#", "a\u2019"]
)
def test_no_text_takes_long(piece: str) -> None:
    text = (piece * 20_000)[:20_000]
    began = time.process_time()
    for kind, (keys, _, _) in OBEYED.items():
        instructions.strict(task(meta={"instructions": [{"kind": kind, **keys}]}), [rollout(text)])
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(
    "piece", ["\\[", "\\(", "$$ ", "$", "$\n", "`", "```", "``` a", "<think>", "<a", "https://", "\u4e00a"]
)
def test_no_text_takes_long_to_tell_its_language(piece: str) -> None:
    text = (piece * 200_000)[:200_000]
    began = time.process_time()
    style.language(task(meta={"script": "latin"}), [rollout(text)])
    assert time.process_time() - began < 2.0


# ---- length, by hand ----

EXACT = "posttrain.rewards.answer:exact"


def _values(reward: RewardFn, *answers: tuple[str, int], **meta: Any) -> list[float | None]:
    given = task(answer="1", meta=meta)
    return reward(given, [rollout(f"answer {text}", sampled=sampled) for text, sampled in answers])


def test_kimi_prefers_short_answers_of_a_group() -> None:
    reward = length.kimi(correct=EXACT)
    assert _values(reward, ("1", 10), ("1", 20), ("1", 30), ("2", 10), ("2", 30)) == [0.5, 0, -0.5, 0, -0.5]
    assert _values(reward, ("1", 10), ("2", 10)) == [0, 0]


def test_cosine_falls_for_right_answers_and_rises_for_wrong_ones() -> None:
    reward = length.cosine(correct=EXACT, limit=100, right=(2.0, 1.0), wrong=(-10.0, 0.0), exceeded=-10.0)
    values = _values(reward, ("1", 0), ("1", 50), ("2", 0), ("2", 50), ("1", 100), ("2", 25))
    assert values == pytest.approx([2, 1.5, -10, -5, -10, -5 * (1 + math.cos(math.pi / 4))])


def test_lengths_that_a_task_asks_for() -> None:
    exact = length.target_exact(correct=EXACT, alpha=0.01)
    assert _values(exact, ("1", 50), ("1", 60), ("2", 40), num_tokens=50) == pytest.approx([1, 0.9, -0.1])
    most = length.target_max(correct=EXACT, alpha=0.01, delta=0.5)
    assert _values(
        most, ("1", 50), ("1", 0), ("1", 99), ("1", 150), ("2", 0), num_tokens=50
    ) == pytest.approx([0.5, 1, 0.01, 0, 0])
    with pytest.raises(ValueError, match="asks for no length"):
        _values(exact, ("1", 1))


def test_shorter_than_usual_compares_correct_answers() -> None:
    reward = length.shorter_than_usual(correct=EXACT, alpha=0.5)
    values = _values(reward, ("1", 10), ("1", 30), ("2", 999))
    fall = [1 / (1 + math.e), 1 / (1 + 1 / math.e)]  # one deviation below and above
    assert values == pytest.approx([1 - 0.5 * fall[0], 1 - 0.5 * fall[1], 0])
    assert _values(reward, ("1", 10)) == [0.75]
    assert _values(reward, ("2", 10)) == [0]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("kimi", {"correct": "no.such:thing"}, "does not load"),
        (
            "cosine",
            {"correct": EXACT, "limit": 0, "right": [1, 1], "wrong": [0, 0], "exceeded": 0},
            "limit=0",
        ),
        ("shorter_than_usual", {"correct": EXACT, "alpha": 1.0}, "need 0 <= alpha < 1"),
    ],
)
def test_bad_lengths_are_one_line(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(f"posttrain.rewards.length:{name}", args)


# ---- form and language ----


def test_every_turn_of_an_agent_has_its_form() -> None:
    turns = [
        {"role": "assistant", "content": "<think> a </think> call"},
        {"role": "tool", "content": "<think>"},
        {"role": "assistant", "content": "<think> b </think> done"},
    ]
    assert style.format_ok(task(), [rollout("", messages=tuple(turns))]) == [1]
    turns[0]["content"] = "<think> a call"
    assert style.format_ok(task(), [rollout("", messages=tuple(turns))]) == [0]


def test_code_and_formulas_are_in_no_language() -> None:
    han = task(meta={"script": "han"})
    text = "\u7b54\u6848 $x = \\frac{a}{b}$ `print(a)` \\boxed{} https://example.com/a ```py\nimport a\n```"
    assert style.language(han, [rollout(text)]) == [1]
    assert style.language(han, [rollout("\u7b54\u6848 is")]) == [pytest.approx(2 / 3)]
    mixed = rollout("<think>so</think>\u7b54\u6848")
    assert style.language(han, [mixed]) == [1]
    assert style.language_throughout(han, [mixed]) == [pytest.approx(2 / 3)]
    assert style.language_throughout(task(), [mixed]) == [None]


@pytest.mark.slow
def test_detection_tells_languages_of_one_script_apart() -> None:
    pytest.importorskip("lingua")
    reward = load_reward("posttrain.rewards.language:detected", {"languages": ["English", "French"]})
    french = "Le petit chat noir dort sur la grande table de la cuisine."
    english = "The small black cat sleeps on the large table in the kitchen."
    given = task(meta={"language": "french"})
    values = reward(
        given, [rollout(t) for t in (french, english, f"{french} {english}", "", "x = 3", "a" * 60_000)]
    )
    assert values == [1, 0, pytest.approx(0.5, abs=0.05), 0, None, 0]
    assert reward(task(), [rollout(french)]) == [None]
    with pytest.raises(ValueError, match="does not know the language 'elvish'"):
        load_reward("posttrain.rewards.language:detected", {"languages": ["english", "elvish"]})
    with pytest.raises(ValueError, match="two or more"):
        load_reward("posttrain.rewards.language:detected", {"languages": ["english"]})


def test_length_counts_sampled_tokens_only() -> None:
    given = rollout("answer 1", sampled=10)
    given.sampled[3:] = np.False_
    assert length.target_exact(correct=EXACT, alpha=0.1)(
        task(answer="1", meta={"num_tokens": 3}), [given]
    ) == [1]
