"""reasoning-gym tasks (rg:// URIs): right or wrong, never partial credit, and no scorer that evaluates text.

The library's own scorer judges where it only compares (COMPARED; each was read for this). Nine of its scorers
evaluate what the model wrote, so theirs are replaced (OWN): four give full marks for an exact match alone, two
are arithmetic (expressions.py), three are algebra, which sympy checks inside the sandbox. Refused are data sets
whose scorer pays for wrong answers, raises, or has no reference answer.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.rewards.base import bounded_if, final_answer, per_rollout
from posttrain.rewards.expressions import arithmetic, related
from posttrain.schema import Rollout, Task

COMPARED = frozenset(
    (
        # strings (the library's default scorer)
        "acre aiw arc_1d base_conversion basic_arithmetic bf binary_alternation caesar_cipher "
        "count_bits count_primes course_schedule gcd isomorphic_strings largest_island lcm "
        "leg_counting letter_counting list_functions mahjong_puzzle maze modulo_grid "
        "number_filtering number_sequence ransom_note rotate_matrix rotten_oranges "
        "simple_equations simple_geometry string_manipulation string_splitting string_synthesis "
        "syllogism word_sequence_reversal "
        # strings, words or decimal numbers in their own way
        "chain_sum dice decimal_arithmetic decimal_chain_sum family_relationships gsm_symbolic "
        "knights_knaves letter_jumble mini_sudoku palindrome_generation products "
        "sentence_reordering shortest_path spell_backward sudoku word_ladder word_sorting "
        "zebra_puzzles"
    ).split()
)
MAX_CHARACTERS = 4096
_FULL_MARKS = 1.0 - 1e-6
Entry = Mapping[str, Any]


def check_allowed(dataset: str) -> None:
    """Raise ValueError for a dataset whose scorer is not on the list."""
    if dataset not in ALLOWED:
        raise ValueError(
            f"rg://{dataset}: not on the list of datasets with a safe scorer; "
            f"known: {', '.join(sorted(ALLOWED))}"
        )


@bounded_if(lambda task: task.meta["dataset"] not in _ALGEBRA)
@per_rollout
def score(task: Task, rollout: Rollout) -> float:
    """1 if the final answer is right, else 0."""
    dataset, entry = task.meta["dataset"], task.meta["entry"]
    check_allowed(dataset)
    answer = final_answer(rollout.text)
    if dataset in OWN:
        return float(OWN[dataset](answer, entry))
    if not answer or len(answer) > MAX_CHARACTERS:
        return 0.0
    if answer == task.answer:
        return 1.0
    try:
        marks = float(_scorer(dataset)(answer, entry))
    except Exception:  # the scorer stumbles over the model's text: a wrong answer
        return 0.0
    return float(marks >= _FULL_MARKS)


@functools.cache
def _scorer(dataset: str) -> Callable[[str, Entry], float]:
    from reasoning_gym import get_score_answer_fn  # heavy: only here

    scorer: Callable[[str, Entry], float] = get_score_answer_fn(dataset)
    return scorer


# ---- scorers of our own, in place of those that evaluate the answer ----


def _exact(answer: str, entry: Entry) -> bool:
    return _lines(answer) == _lines(entry["answer"])


def _n_queens(answer: str, entry: Entry) -> bool:
    return _lines(answer) in [_lines(board) for board in entry["metadata"]["valid_answers"]]


def _countdown(answer: str, entry: Entry) -> bool:
    return _makes(answer, entry["metadata"]["numbers"], entry["metadata"]["target"])


def _puzzle24(answer: str, entry: Entry) -> bool:
    return _makes(answer, entry["metadata"]["numbers"], 24)


def _product(answer: str, entry: Entry) -> bool:
    return related("same", answer, entry["answer"], entry["metadata"]["variables"])


def _integral(answer: str, entry: Entry) -> bool:
    return related("antiderivative", answer, entry["metadata"]["integrand"], [entry["metadata"]["variable"]])


def _makes(answer: str, numbers: list[int], target: int) -> bool:
    """Whether an expression uses exactly these numbers and has this value."""
    found = arithmetic(answer)
    return found is not None and found[0] == target and sorted(found[1]) == sorted(numbers)


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.strip().splitlines()]


_ALGEBRA: dict[str, Callable[[str, Entry], bool]] = {
    "polynomial_multiplication": _product,
    "simple_integration": _integral,
    "intermediate_integration": _integral,
}
OWN: dict[str, Callable[[str, Entry], bool]] = {
    "spiral_matrix": _exact,
    "binary_matrix": _exact,
    "string_insertion": _exact,
    "n_queens": _n_queens,
    "countdown": _countdown,
    "puzzle24": _puzzle24,
    **_ALGEBRA,
}
ALLOWED = COMPARED | OWN.keys()
