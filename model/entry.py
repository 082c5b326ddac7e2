"""What a cache holds of one token in one layer: [latent | rotary key | indexer key], as numbers of the model's type.

Where a checkpoint scores in e4m3 (index_dtype = "e4m3" in its config.json, so that learner and engines cannot differ), the
indexer key is stored in that form: the bytes of I e4m3 numbers and of their fp32 scale, padded until the next entry begins where
kernels load 16 bytes at once (../kernels/e4m3.py). One allocation, and one layout in every cache. Imports no torch. Next:
context.py, ../rollouts/geometry.py.
"""

from dataclasses import dataclass
from typing import Any, Self

ALIGNMENT = 32
"""Bytes: Triton counts on a stride of multiples of 16 numbers, of two bytes here, or loads them one by one."""
GRAIN = 16
"""e4m3 numbers loaded at once."""
SCALE_BYTES = 4
BLOCK = 128
"""Numbers that may share a scale (DeepSeek-V3.2: weight_block_size)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The sizes of an entry."""

    latent: int
    """Numbers of latent and rotary key."""
    index: int
    """Numbers of the indexer key; 0 in a dense model."""
    e4m3: bool = False

    @classmethod
    def of(cls, config: Any) -> Self:
        """From the config of a sparse model; ValueError for what it cannot mean."""
        dtype = getattr(config, "index_dtype", "model")
        need_index_dtype(dtype, index=config.index_head_dim, latent=config.kv_lora_rank)
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        return cls(latent=latent, index=config.index_head_dim, e4m3=dtype == "e4m3")

    def stored(self, itemsize: int) -> int:
        """Numbers of the model's type, of that many bytes, that the indexer key takes."""
        if not self.e4m3:
            return self.index
        end = self.latent * itemsize + self.index + SCALE_BYTES
        return -(-end // ALIGNMENT) * ALIGNMENT // itemsize - self.latent

    def width(self, itemsize: int) -> int:
        """Numbers of the whole entry."""
        return self.latent + self.stored(itemsize)


def need_index_dtype(index_dtype: str, *, index: int, latent: int) -> None:
    """Raise ValueError if index scores cannot be made that way from keys of so many numbers beside such latents."""
    if index_dtype not in ("model", "e4m3"):
        raise ValueError(f'index_dtype={index_dtype!r}: write "model" (the type of the model) or "e4m3"')
    if index_dtype == "model":
        return
    if index % GRAIN or not 0 < index <= BLOCK:
        raise ValueError(
            f'index_head_dim={index}: index_dtype = "e4m3" needs a multiple of {GRAIN}, at most {BLOCK}, so that a key '
            "has one scale"
        )
    if latent % 2:
        raise ValueError(f'kv_lora_rank={latent}: index_dtype = "e4m3" needs an even number')
