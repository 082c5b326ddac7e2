"""Samples for language-model training: demonstrations of the domains, text, chats, distilled rows.

Every source is an endless stream in an order fixed by the seed; an id stands for one use of a row, so
the epoch is part of it. Held-out samples come from held-out tasks or documents. Next: text.py for
reading files, packing.py.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from random import Random

import numpy as np

from posttrain import text
from posttrain.config import TextData
from posttrain.domains import Domain
from posttrain.rollouts import chat
from posttrain.schema import Sample


def demonstrations(
    domains: Sequence[Domain], tokenizer: chat.Tokenizer, *, seed: int, heldout: bool = False
) -> Iterator[Sample]:
    """Demonstrations, the domains taking turns; the loss is on the assistant's tokens.

    Raises ValueError if a domain has no `demonstrate`.
    """
    for domain in domains:
        if domain.demonstrate is None:
            raise ValueError(
                f"domain {domain.name!r} has no demonstrations: set demonstrate, or read text with data.text"
            )
    rng = Random(seed)
    for i in itertools.count():
        domain = domains[i % len(domains)]
        tasks = domain.split.heldout if heldout else domain.split.train
        task = rng.choice(tasks)
        assert domain.demonstrate is not None, "checked above"
        messages = [*task.messages, *domain.demonstrate(task, rng)]
        yield text.chat_sample(f"{domain.name}.{i}", messages, tokenizer)


def lm_stream(
    data: TextData,
    domains: Sequence[Domain],
    tokenizer: chat.Tokenizer,
    *,
    seed: int,
    heldout: bool = False,
) -> Iterator[Sample]:
    """Samples of a language-model stage: the text and chats it names, or else demonstrations."""
    if data.files:
        samples = text.documents(data, tokenizer, heldout=heldout)
    else:
        samples = demonstrations(domains, tokenizer, seed=seed, heldout=heldout)
    return map(_all_tokens, samples) if data.loss_on == "all" else samples


def counted(stream: Iterable[Sample], *, topk: int, at_least: int) -> list[Sample]:
    """The first samples that hold at_least targets predicted from a query with more than topk keys."""
    chosen: list[Sample] = []
    total = 0
    for sample in stream:
        chosen.append(sample)
        total += int(sample.mask[topk + 1 :].sum())  # token t is predicted at t - 1, from t keys
        if total >= at_least:
            return chosen
    raise ValueError(
        f"held-out data has only {total} targets with more than {topk} causal keys, {at_least} wanted; "
        "lower heldout_tokens or add data"
    )


def epochs(rows: Sequence[Sample], *, seed: int) -> Iterator[Sample]:
    """The rows again and again, shuffled anew each time; ids get the epoch."""
    rng = Random(seed)
    for epoch in itertools.count():
        for i in rng.sample(range(len(rows)), len(rows)):
            yield _renamed(rows[i], f"{rows[i].id}#{epoch}")


def balanced(rows: Sequence[Sample], *, seed: int) -> Iterator[Sample]:
    """Like epochs, the domains taking turns, so that a small domain is not drowned."""
    names = sorted({row.domain for row in rows})
    streams = [epochs([r for r in rows if r.domain == n], seed=seed + i) for i, n in enumerate(names)]
    for turn in itertools.cycle(streams):
        yield next(turn)


def steps(stream: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    """The stream in lists of `size` samples."""
    while True:
        yield list(itertools.islice(stream, size))


def _all_tokens(sample: Sample) -> Sample:
    mask = np.ones(len(sample.tokens), np.bool_)
    mask[0] = False
    return Sample(id=sample.id, tokens=sample.tokens, mask=mask)


def _renamed(sample: Sample, id: str) -> Sample:
    return Sample(id=id, tokens=sample.tokens, mask=sample.mask, domain=sample.domain)
