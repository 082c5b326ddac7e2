"""A judge behind an endpoint that speaks OpenAI's protocol: vLLM, SGLang, a hosted service. Next: judge.py."""

import os
from collections.abc import Sequence
from typing import Any

from posttrain.rewards.base import Unscorable
from posttrain.rewards.judge import Unreachable
from posttrain.schema import Message


class Endpoint:
    """Asks a model for chat completions in a JSON schema."""

    def __init__(
        self,
        *,
        model: str,
        base_url: str = "http://127.0.0.1:8000/v1",
        revision: str = "",
        api_key_variable: str = "",
        max_tokens: int = 1024,
        timeout_s: float = 20.0,
    ) -> None:
        """api_key_variable: name of the environment variable that holds the key; empty where none is needed.

        revision: goes into the key of the cache; change it when the model behind the name changes.
        """
        self.identity = f"{model}@{revision} {base_url} {max_tokens}"
        self._model, self._url, self._max_tokens, self._timeout_s = model, base_url, max_tokens, timeout_s
        self._key_variable = api_key_variable

    async def reply(
        self, messages: Sequence[Message], *, schema: dict[str, Any], temperature: float, seed: int
    ) -> str:
        """As Judge.reply."""
        openai = _library()
        key = os.environ.get(self._key_variable, "") if self._key_variable else "EMPTY"
        if not key:
            raise Unscorable(f"the environment variable {self._key_variable} holds no key for the judge")
        # A client belongs to the event loop that it is used in, and every group of rollouts has its own.
        async with openai.AsyncOpenAI(
            base_url=self._url, api_key=key, max_retries=0, timeout=self._timeout_s
        ) as client:
            try:
                completion = await client.chat.completions.create(
                    model=self._model,
                    messages=list(messages),
                    temperature=temperature,
                    seed=seed,
                    max_tokens=self._max_tokens,
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"name": "marks", "schema": schema, "strict": True},
                    },
                )
            except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
                raise Unreachable(f"{self._url}: {error}") from error
            except openai.OpenAIError as error:
                raise Unscorable(f"the judge at {self._url} refuses: {error}") from error
        if not completion.choices:
            raise Unreachable(f"{self._url}: a reply without choices")
        return completion.choices[0].message.content or ""


def _library() -> Any:
    try:
        import openai  # a second, and an extra
    except ImportError:
        raise Unscorable("the judge needs the openai package; pip install 'posttrain[judge]'") from None
    return openai
