"""A paged cache as the kernels see it: a pool of blocks, and which of them each sequence has.

Next: copy_triton.py, paged_index_topk_triton.py, paged_mla_triton.py.

Shape letters: B sequences, P blocks in the pool, S tokens of a block, M blocks of a sequence, E entry size
(latent + rotary), I indexer head size, T rows of X numbers, N rows of K positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.kernels.backend import has_kernel

ONE_BLOCK = 1 << 30


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's cache. Token t of sequence b is token t mod S of block table[b, t div S].

    Both pools may be views of one tensor, such as the parts of [latent | rotary key | indexer key] (any strides,
    the last one 1). Table entries of blocks that are not in use, and what lies in blocks beyond a sequence's
    length, may be anything: nobody reads it. Raises ValueError for what does not fit.
    """

    entries_PSE: Tensor
    index_PSI: Tensor
    table_BM: Tensor
    """int32."""
    lengths_B: Tensor
    """int32, on the device: tokens of each sequence, its new ones included; 0 is an empty row."""
    max_length: int
    """No length is greater. It decides the grid, so one captured CUDA graph serves all lengths up to it."""
    scale_PS: Tensor | None = None
    """fp32 scales of index keys in e4m3, one per token, with strides of their own; others have none."""

    def __post_init__(self) -> None:
        pools = (self.entries_PSE, self.index_PSI)
        if any(pool.stride(2) != 1 for pool in pools) or pools[0].shape[:2] != pools[1].shape[:2]:
            raise ValueError(
                f"pools {tuple(pools[0].shape)} and {tuple(pools[1].shape)}: the same blocks, last stride 1"
            )
        scale = self.scale_PS
        fits = scale is None or (scale.dtype == torch.float32 and scale.shape == pools[1].shape[:2])
        if (pools[1].dtype == torch.float8_e4m3fn) != (scale is not None) or not fits:
            raise ValueError(
                f"index keys {tuple(pools[1].shape)} {pools[1].dtype} with scales "
                f"{None if scale is None else (*scale.shape, scale.dtype)}: e4m3 has one in fp32 per token, others none"
            )
        table, lengths = self.table_BM, self.lengths_B
        if table.dtype != torch.int32 or lengths.dtype != torch.int32 or table.stride(1) != 1:
            raise ValueError(f"table {table.dtype}, lengths {lengths.dtype}: both are int32, rows contiguous")
        if lengths.shape != table.shape[:1]:
            raise ValueError(f"{len(lengths)} lengths for {len(table)} rows of the table")
        if not 0 < self.max_length <= self.room:
            raise ValueError(
                f"max_length={self.max_length}: a row of the table holds 1 to {self.room} tokens"
            )

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.entries_PSE.shape[1]

    @property
    def page(self) -> int:
        """Tokens of a block as the kernels are compiled for: of one block alone any number does, and one is enough."""
        return self.block_size if self.table_BM.shape[1] > 1 else ONE_BLOCK

    @property
    def room(self) -> int:
        """Tokens that a row of the table holds."""
        return self.table_BM.shape[1] * self.block_size


def slots_of(position_NK: Tensor, table_NM: Tensor, block_size: int) -> Tensor:
    """Slots int64 of positions in sequences, a row of the table for each row; -1 where a position is negative."""
    at_NK = position_NK.clamp(min=0)
    block_NK = table_NM.gather(1, (at_NK // block_size).long())
    return (block_NK.long() * block_size + at_NK % block_size).masked_fill(position_NK < 0, -1)


def write(pool_PSX: Tensor, slots_T: Tensor, x_TX: Tensor) -> None:
    """Put rows into a pool, each at its slot: block times S plus place, int64. Of several for one slot any stays."""
    if has_kernel(pool_PSX):
        from posttrain.kernels import copy_triton  # triton exists on Linux only

        copy_triton.write(pool_PSX, slots_T, x_TX)
    else:
        pool_PSX[slots_T // pool_PSX.shape[1], slots_T % pool_PSX.shape[1]] = x_TX


def read(pool_PSX: Tensor, slots_T: Tensor) -> Tensor:
    """The rows [T, X] at such slots."""
    if has_kernel(pool_PSX):
        from posttrain.kernels import copy_triton  # triton exists on Linux only

        return copy_triton.read(pool_PSX, slots_T)
    return pool_PSX[slots_T // pool_PSX.shape[1], slots_T % pool_PSX.shape[1]]
