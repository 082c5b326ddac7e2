"""An engine without a model, for tests: echoes the reference answer for even indices, nonsense for odd ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.rollouts import chat
from posttrain.rollouts.environment import Live
from posttrain.rollouts.request import Request, Sampling
from posttrain.schema import Rollout


class FakeEngine:
    """The surface of TorchEngine with canned answers."""

    def __init__(self, tokenizer: chat.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.version = 0
        self.backend = "none (canned answers)"

    def load(self, version: int, weights: dict[str, Any]) -> None:
        """Note the version; there is nothing to load into."""
        self.version = version

    def sleep(self) -> None:
        """There is nothing to give up."""

    def close(self) -> None:
        """Nothing is held."""

    def generate(
        self, requests: Sequence[Request], settings: Sampling, *, max_rows: int = 256
    ) -> list[Rollout]:
        """One canned rollout per request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Rollout:
        text = f"answer {request.task.answer}" if request.index % 2 == 0 else "answer ?"
        prompt = chat.encode_prompt(self.tokenizer, request.task)
        completion = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        sampled = np.array([False] * len(prompt) + [True] * len(completion))
        stop, outcome = Live(request.environment, request.task, request.seed).end("eos")
        return Rollout(
            task_id=request.task.id,
            index=request.index,
            tokens=np.array([*prompt, *completion], np.int32),
            sampled=sampled,
            logprobs=np.where(sampled, -1.0, 0.0).astype(np.float32),
            text=text,
            messages=({"role": "assistant", "content": text},),
            stop=stop,
            outcome=outcome,
            policy_version=self.version,
        )
