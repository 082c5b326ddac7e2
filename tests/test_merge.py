"""Entries of neighbouring queries, merged in Triton: by hand, and against sets."""

import pytest
import torch

from posttrain.kernels.merge_triton import MOST, merge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONE = 0x7FFF


def _lists(slots: list[list[int]], num_slots: int) -> list[list[tuple[int, int, int]]]:
    """(slot, place in the first row, place in the second), -1 for none, of every pair."""
    found = merge(torch.tensor(slots, dtype=torch.int32, device=DEVICE), num_slots)
    kept = [sum(0 <= slot < num_slots for slot in row) for row in slots]
    assert found.kept_P2.view(-1).tolist() == kept + [0] * (len(slots) % 2)
    rows = []
    for pair, num in enumerate(found.num_P.tolist()):
        entries = found.slots_PU[pair, :num].tolist()
        places = [(x & NONE, (x >> 16) & NONE) for x in found.places_PU[pair, :num].tolist()]
        rows.append(
            [(s, -1 if a == NONE else a, -1 if b == NONE else b) for s, (a, b) in zip(entries, places)]
        )
    return rows


def test_two_rows_by_hand() -> None:
    rows = _lists([[2, 5, 6, 9, -1], [1, 5, 9, 10, 11], [3, -1, -1, -1, -1]], 12)
    assert rows[0] == [(1, -1, 0), (2, 0, -1), (5, 1, 1), (6, 2, -1), (9, 3, 2), (10, -1, 3), (11, -1, 4)]
    assert rows[1] == [(3, 0, -1)], "an odd last query stands alone"


def test_empty_rows_and_slots_that_are_none() -> None:
    assert _lists([[-1, -1], [-1, -1]], 9) == [[]]
    assert _lists([[-1, -1], [4, 7]], 9) == [[(4, -1, 0), (7, -1, 1)]]
    assert _lists([[4, 9], [4, 7]], 9) == [[(4, 0, 0), (7, -1, 1)]], "9 is beyond the end"


@pytest.mark.parametrize("first", [[4, -1, 7], [7, 4, -1], [4, 4, 7]], ids=["hole", "order", "duplicate"])
def test_rows_that_do_not_ascend_are_not_merged(first: list[int]) -> None:
    behind = [(4, -1, 0), (5, -1, 1), (-1, -1, -1)]
    rows = _lists([first, [4, 5, -1]], 9)
    assert rows == [[(slot, place if slot >= 0 else -1, -1) for place, slot in enumerate(first)] + behind]


@pytest.mark.parametrize("kept", [1, 63, 100])
def test_many_rows_are_unions(kept: int) -> None:
    make = torch.Generator().manual_seed(kept)
    keys, rows = 3 * kept, []
    for n in range(9):
        count = kept - n % 3 * (kept // 3)
        rows.append(sorted(torch.randperm(keys, generator=make)[:count].tolist()) + [-1] * (kept - count))
    for pair, found in enumerate(_lists(rows, keys)):
        mine = [{s: i for i, s in enumerate(row) if s >= 0} for row in rows[2 * pair : 2 * pair + 2]]
        mine += [{}] * (2 - len(mine))
        union = sorted(set(mine[0]) | set(mine[1]))
        assert found == [(s, mine[0].get(s, -1), mine[1].get(s, -1)) for s in union]


def test_a_last_row_that_does_not_ascend_has_no_neighbour_to_read() -> None:
    found = merge(torch.tensor([[4, -1, 7]], dtype=torch.int32, device=DEVICE), 9)
    places = [(x & NONE, x >> 16) for x in found.places_PU[0].tolist()]
    assert places == [(0, NONE), (NONE, NONE), (2, NONE), *[(NONE, NONE)] * 3]


def test_merge_refuses_what_does_not_fit() -> None:
    for slots in (torch.zeros(2, MOST + 1, dtype=torch.int32), torch.zeros(2, 3), torch.zeros(3, 2).int().T):
        with pytest.raises(ValueError, match="contiguous int32"):
            merge(slots, 5)
