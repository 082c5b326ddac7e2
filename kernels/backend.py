"""Which kernels run the sparse attention: Triton's or PyTorch's; decided once, reported, never changed silently.

A model's learner and its engines ask resolve() when they are made and hand the answer down with every pass.
Triton has no [queries, keys] array and needs a CUDA device (or, for tests, its interpreter); PyTorch runs
everywhere. Left out: dense attention, which is torch's own in both. Next: dsa.py, ../model/context.py.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch

Choice = Literal["auto", "triton", "torch"]

TILE_ROWS = 192
"""Rows of an entry's size that a kernel holds in shared memory: 64 heads and two blocks of 64 entries."""
_SPARE_BYTES = 4096  # probabilities and barriers


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """The answer: what runs, why, and how."""

    name: Literal["triton", "torch"]
    reason: str
    deterministic: bool = False
    """Gradients that many queries add to are the same bits every time; and with Triton's kernels a token has the same bits in
    every batch, in training as in generation (invariant.py)."""
    dense_rows: bool = True
    """With Triton: rows that keep all their keys go through dense attention, the same function for less."""
    max_rows: int = 64
    """Sequences that an engine decodes at the same time: what the parts of a row are sized for."""

    @property
    def invariant(self) -> bool:
        """Whether the model's products, too, must not see which rows stand beside theirs."""
        return self.deterministic and self.name == "triton"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason}{', deterministic' if self.deterministic else ''})"


TORCH = Backend(name="torch", reason="default")


def has_kernel(x: torch.Tensor) -> bool:
    """Whether a kernel takes the place of torch's own copies and rotations, in either backend: on a GPU."""
    return x.is_cuda


def resolve(
    choice: Choice,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_heads: int,
    entry_size: int,
    deterministic: bool = False,
) -> Backend:
    """The backend for a device, a type, a number of heads and the size of a cache entry (latent and rotary part).

    "auto" leaves fp32 models to torch: the kernels would multiply them in three TF32 products. Raises
    ValueError if "triton" is asked for and cannot run here; "auto" then says why it is "torch".
    """
    if choice == "torch":
        return Backend(name="torch", reason="asked for", deterministic=deterministic)
    entry_bytes = entry_size * dtype.itemsize
    why_not = _obstacle(device, num_heads, entry_bytes, interpreter=choice == "triton")
    if why_not is None and choice == "auto" and dtype == torch.float32:
        why_not = "the model is in float32"
    if why_not is None:
        on_gpu = device.type == "cuda"
        where = torch.cuda.get_device_name(device) if on_gpu else "Triton's interpreter"
        return Backend(name="triton", reason=where, deterministic=deterministic)
    if choice == "triton":
        raise ValueError(f'backend "triton" cannot run: {why_not}; write backend = "auto" or "torch"')
    return Backend(name="torch", reason=why_not, deterministic=deterministic)


def _obstacle(device: torch.device, num_heads: int, entry_bytes: int, *, interpreter: bool) -> str | None:
    """Why Triton's kernels cannot run; the interpreter counts only for who asked for Triton."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        interpreted = interpreter and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"the model is on {device.type}"
    from posttrain.kernels.sparse_mla_triton import MAX_HEADS  # triton exists on Linux only

    if num_heads > MAX_HEADS:
        return f"{num_heads} heads, the kernels take {MAX_HEADS}"
    needed = TILE_ROWS * entry_bytes + _SPARE_BYTES
    properties = torch.cuda.get_device_properties(device)
    there = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # torch's stub lacks it
    if needed > there:
        return f"entries of {entry_bytes} bytes need {needed} bytes of shared memory, {properties.name} has {there}"
    return None
