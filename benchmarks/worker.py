"""What both sides of vs_trl.py share: the specification of a run, the reward, the clock, the result.

Imported in two virtual environments, so it needs the standard library and torch only. Next: trl_worker.py,
ours_worker.py.
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

# Python put this folder on the path. transformers looks for Hugging Face's package `kernels` and would take
# kernels.py of this folder for it.
sys.path.remove(str(Path(__file__).parent))


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One process: the same for both sides."""

    checkpoint: str
    prompts: list[str]
    """Questions, tasks_per_step for every step; no step repeats one."""
    tasks_per_step: int
    group_size: int
    new_tokens: int
    stop_at_eos: bool
    warmup_steps: int
    steps: int
    threads: int
    lr: float
    betas: tuple[float, float]
    clip: float
    seed: int
    device: str
    """"cpu" or "cuda"."""
    dtype: str
    """Of the weights."""
    rollouts: str
    """How this side generates: a word of its own worker."""
    micro_batch: int
    """Sequences of one forward and backward pass of TRL."""
    tokens_per_batch: int
    """Tokens of one of ours, prompts counted for every completion."""
    recompute: bool
    """Keep the input of each layer alone for the backward pass."""
    max_rows: int
    """Sequences that we decode at the same time."""
    longest: int
    """Tokens of the longest prompt with its completion."""

    @property
    def total_steps(self) -> int:
        """Warm-up included."""
        return self.warmup_steps + self.steps

    @property
    def completions(self) -> int:
        """Per step."""
        return self.tasks_per_step * self.group_size


@dataclass
class Step:
    """One step of one process, in seconds."""

    generate: float = 0.0
    score: float = 0.0
    total: float = 0.0
    cpu: float = 0.0
    """CPU time of this process, all threads: hardly moved by what else runs on the machine."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each completion, its stop token included."""
    prompts: str = ""
    """Hash of the prompt tokens in order: both sides must have the same."""


def read_spec() -> Spec:
    """The specification whose path is the first argument."""
    return Spec(**json.loads(Path(sys.argv[1]).read_text()))


def reward(text: str) -> float:
    """Share of the words that are single letters: cheap, and different within almost every group."""
    words = text.split()
    return sum(len(word) == 1 for word in words) / max(len(words), 1)


def check(spec: Spec, lengths: list[int]) -> None:
    """Assert the amount of work of one step."""
    assert len(lengths) == spec.completions, f"{len(lengths)} completions, not {spec.completions}"
    most = max(lengths)
    assert most <= spec.new_tokens, f"a completion of {most} tokens, the limit is {spec.new_tokens}"
    if not spec.stop_at_eos:
        assert set(lengths) == {spec.new_tokens}, f"lengths {sorted(set(lengths))} with EOS off"


def prompts_hash(prompts: list[list[int]]) -> str:
    """A short name of the prompt tokens of a step."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]


def peak_bytes() -> int:
    """Largest resident memory of this process since it was executed."""
    # Not ru_maxrss: that one also remembers the process that started this one.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "no VmHWM in /proc/self/status"
    return int(found[1]) * 1024


def synchronize(spec: Spec) -> None:
    """Wait for what was launched on a GPU."""
    if spec.device == "cuda":
        torch.cuda.synchronize()


def allocated_bytes(spec: Spec) -> int | None:
    """Largest memory of tensors on the GPU in this process so far."""
    return torch.cuda.max_memory_allocated() if spec.device == "cuda" else None


def write_result(spec: Spec, steps: list[Step], peak: int, versions: dict[str, str], **more: Any) -> None:
    """Hand the measured steps to vs_trl.py, in the file that the second argument names."""
    assert len(steps) == spec.total_steps, f"{len(steps)} steps, not {spec.total_steps}"
    result = {
        "steps": [asdict(step) for step in steps[spec.warmup_steps :]],
        "warmup": [step.total for step in steps[: spec.warmup_steps]],
        "peak_bytes": peak,
        "load": os.getloadavg()[0],
        "versions": versions,
        **more,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
