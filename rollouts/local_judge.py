"""A judge that is a checkpoint of ours, in this process: no server, for small models and for machines without a network.

Used as rewards = [{ fn = "posttrain.rewards.judge:rubric", args = { backend = "posttrain.rollouts.local_judge:EngineJudge",
judge = { checkpoint = "stage://judge" } } }]: a stage of the same run, or a path. It cannot be held to a schema; a reply that is none is asked for
again. Every reward worker holds a copy of the model. Next: ../rewards/judge.py, torch_engine.py.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.model import checkpoint
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.schema import Message, Task

_GATHER_S = 0.01
"""Questions that come within this time are answered in one batch."""


@dataclass(frozen=True, slots=True)
class _Question:
    request: Request
    temperature: float
    answer: "asyncio.Future[str]"


class EngineJudge:
    """Replies of a model that is loaded when first asked."""

    def __init__(
        self, *, checkpoint: str, max_tokens: int = 512, device: str = "cpu", max_rows: int = 64
    ) -> None:
        """Raises ValueError if there is no checkpoint."""
        if not (Path(checkpoint) / "config.json").is_file():
            raise ValueError(f"{checkpoint}: no checkpoint there (config.json is missing)")
        self.identity = f"{Path(checkpoint).resolve()} {_state(Path(checkpoint))} {max_tokens}"
        self._checkpoint, self._max_tokens, self._device = Path(checkpoint), max_tokens, device
        self._max_rows = max_rows
        self._engine: TorchEngine | None = None
        self._waiting: list[_Question] = []
        self._gathering: asyncio.Task[None] | None = None

    async def reply(
        self, messages: Sequence[Message], *, schema: dict[str, Any], temperature: float, seed: int
    ) -> str:
        """As Judge.reply."""
        task = Task(id=repr(list(messages)), domain="judge", messages=tuple(messages), thinking=False)
        request = Request(task=task, index=0, seed=seed, max_new_tokens=self._max_tokens)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Question(request, temperature, answer))
        if len(self._waiting) == 1:
            self._gathering = asyncio.create_task(
                self._answer_soon()
            )  # not this question's: it may be cancelled
        return await answer

    async def _answer_soon(self) -> None:
        await asyncio.sleep(_GATHER_S)
        asked, self._waiting = self._waiting, []
        self._answer(asked)

    def _answer(self, questions: Sequence[_Question]) -> None:
        """Generate; the loop waits meanwhile, since it has nothing else to do."""
        self.prepare()
        assert self._engine is not None
        for temperature in sorted({q.temperature for q in questions}):
            asked = [q for q in questions if q.temperature == temperature]
            settings = Sampling(temperature=temperature)
            rollouts = self._engine.generate([q.request for q in asked], settings, max_rows=self._max_rows)
            for question, rollout in zip(asked, rollouts, strict=True):
                if not question.answer.cancelled():
                    question.answer.set_result(rollout.text)

    def prepare(self) -> None:
        """Load the model, if that has not happened."""
        if self._engine is None:
            torch.set_num_threads(1)  # there is a worker for every core
            attention = checkpoint.attention_of(self._checkpoint)
            self._engine = TorchEngine.open(self._checkpoint, attention, device=self._device)


def _state(checkpoint: Path) -> str:
    """Sizes and times of the weights: another training makes another judge."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
