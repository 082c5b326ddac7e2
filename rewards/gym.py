"""reasoning-gym tasks (rg:// URIs) judged by their own scorers, where these are safe.

Some of its scorers evaluate the model's text (eval, sympy) or can be made to compute for hours; only the
ones on the list below are used, each read for this. Partial credit is dropped: 1 or 0.
"""

import functools
from collections.abc import Callable
from typing import Any

from posttrain.rewards.base import bounded, final_answer, per_rollout
from posttrain.schema import Rollout, Task

ALLOWED = frozenset(
    (
        # compare strings (the library's default scorer)
        "acre aiw arc_1d base_conversion basic_arithmetic bf binary_alternation caesar_cipher "
        "count_bits count_primes course_schedule gcd isomorphic_strings largest_island lcm "
        "leg_counting letter_counting list_functions mahjong_puzzle maze modulo_grid "
        "number_filtering number_sequence ransom_note rotate_matrix rotten_oranges "
        "simple_equations simple_geometry string_manipulation string_splitting string_synthesis "
        "syllogism word_sequence_reversal "
        # compare strings, words or decimal numbers in their own way
        "chain_sum dice decimal_arithmetic decimal_chain_sum family_relationships gsm_symbolic "
        "knights_knaves letter_jumble mini_sudoku palindrome_generation products "
        "sentence_reordering shortest_path spell_backward sudoku word_ladder word_sorting "
        "zebra_puzzles"
    ).split()
)
MAX_CHARACTERS = 4096
_FULL_MARKS = 1.0 - 1e-6


def check_allowed(dataset: str) -> None:
    """Raise ValueError for a dataset whose scorer is not on the list."""
    if dataset not in ALLOWED:
        raise ValueError(
            f"rg://{dataset}: not on the list of datasets with a safe scorer; "
            f"known: {', '.join(sorted(ALLOWED))}"
        )


@bounded
@per_rollout
def score(task: Task, rollout: Rollout) -> float:
    """1 if the dataset's scorer gives the final answer full marks, else 0."""
    dataset, entry = task.meta["dataset"], task.meta["entry"]
    check_allowed(dataset)
    answer = final_answer(rollout.text)
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
def _scorer(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn  # heavy: only here

    scorer: Callable[[str, dict[str, Any]], float] = get_score_answer_fn(dataset)
    return scorer
