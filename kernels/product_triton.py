"""Matrix product for Triton kernels that also run in its interpreter, where a product of bf16 is silently wrong.

See github.com/triton-lang/triton/issues/11584. Next: indexer_kl_triton.py.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, INTERPRET: tl.constexpr):
    """a @ b with fp32 sums; `acc += dot(...)` becomes one instruction. fp32 factors lose nothing to TF32."""
    if (
        INTERPRET
    ):  # numpy's, which may add up a row in another order where it stands elsewhere: not to be seen in fp32
        return tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


def interpreted() -> bool:
    """Whether kernels run in the interpreter: what kernels take as INTERPRET."""
    return bool(triton.knobs.runtime.interpret)


def block(size: int) -> int:
    """Size of the block that holds a dimension of a product: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def twice_relu(x):
    """2 max(x, 0) in fp32, exactly: an addition whose absolute value is free, where a maximum takes two turns. Of -inf NaN."""
    return x + tl.abs(x)
