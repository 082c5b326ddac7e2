"""Weights on their way from process to process: which way, the same tensors by each, and nothing half."""

import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from posttrain.model import checkpoint, transport
from posttrain.model.transport import Audience, Offer, Receiver, Sender, views
from posttrain.model.weights import checksum, take
from posttrain.publisher import Publisher

CPU = torch.device("cpu")
TWO = Audience(engines=("", ""), ranks=("",), choice="broadcast")


@pytest.fixture
def sender(tmp_path: Path) -> Iterator[Sender]:
    made = Sender(CPU, host="127.0.0.1", folder=tmp_path / "sync", timeout_s=20)
    yield made
    made.close()


def _offer(sender: Sender, tensors: dict[str, Tensor], audience: Audience) -> Offer:
    """As it arrives in another process."""
    sent = pickle.dumps(sender.offer(tensors, tensors.items(), audience, rank=0))
    found: Offer = pickle.loads(sent)
    return found


def _receivers(num: int, *, timeout_s: float = 20) -> list[Receiver]:
    return [Receiver(CPU, index=i, timeout_s=timeout_s) for i in range(num)]


@pytest.mark.parametrize(
    ("engines", "ranks", "choice", "routes"),
    [
        (("", ""), ("",), "auto", ["memory", "memory"]),
        (("a", "a"), ("a",), "auto", ["ipc", "ipc"]),
        (("a", "b", "c"), ("a", "b"), "auto", ["ipc", "ipc", "broadcast"]),
        (("b", "c"), ("a",), "broadcast", ["broadcast", "broadcast"]),
        (("a", "b"), ("a",), "disk", ["disk", "disk"]),
        (("a",), ("a",), "memory", ["memory"]),
        (("a", "c"), ("a", "b"), "ipc", "rollout actor 1 has no GPU in common"),
        (("",), ("",), "ipc", "rollout actor 0 has no GPU in common"),
        (("b", "a"), ("a",), "broadcast", "rollout actor 1 shares its GPU with the learner"),
    ],
)
def test_each_engine_has_its_way_or_an_error(
    engines: tuple[str, ...], ranks: tuple[str, ...], choice: str, routes: list[str] | str
) -> None:
    audience = Audience(engines=engines, ranks=ranks, choice=choice)  # type: ignore[arg-type]
    if isinstance(routes, list):
        assert audience.routes() == routes
    else:
        with pytest.raises(ValueError, match=routes):
            audience.routes()


@pytest.mark.parametrize("choice", ["memory", "broadcast", "disk"])
def test_every_way_brings_the_same_bits_twice(sender: Sender, choice: str) -> None:
    audience = replace(TWO, choice=choice)  # type: ignore[arg-type]
    receivers, engines = _receivers(2), [tiny.model(seed=1), tiny.model(seed=2)]
    with ThreadPoolExecutor(2) as pool:
        for seed in (3, 4):
            learner = tiny.model(seed=seed).bfloat16() if choice == "disk" else tiny.model(seed=seed)
            for engine in engines:
                engine.to(learner.lm_head.weight.dtype)
            offer = _offer(sender, learner.state_dict(), audience)
            learner.lm_head.weight.data.zero_()  # training goes on
            arriving = [pool.submit(receiver.accept, [offer]) for receiver in receivers]
            for engine, weights in zip(engines, arriving, strict=True):
                take(engine, weights.result())
                assert checksum(engine.state_dict()) == offer.checksum
                assert engine.lm_head.weight.abs().max() > 0


def test_an_engine_takes_what_is_offered_to_it_alone(sender: Sender) -> None:
    tensors = {"a": torch.arange(5.0)}
    offer = _offer(sender, tensors, replace(TWO, only=1, generation=1))
    assert offer.meeting is not None and offer.meeting.engines == (1,)
    second = Receiver(CPU, index=1, timeout_s=20)
    assert torch.equal(second.accept([None, offer]).tensors["a"], tensors["a"])
    with pytest.raises(ValueError, match="rollout actor 0: no weights are offered"):
        Receiver(CPU, index=0, timeout_s=20).accept([None, offer])
    # The one that was replaced and the others meet anew.
    both = _offer(sender, {"a": torch.arange(5.0) + 1}, replace(TWO, generation=1))
    with ThreadPoolExecutor(2) as pool:
        pair = [Receiver(CPU, index=0, timeout_s=20), second]
        for weights in [pool.submit(receiver.accept, [both]) for receiver in pair]:
            assert weights.result().tensors["a"].tolist() == [1, 2, 3, 4, 5]


def test_a_broadcast_cut_half_way_changes_nothing_and_can_be_repeated(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_CHUNK", 1000)
    learner, engine = tiny.model(seed=3), tiny.model(seed=1)
    before, (receiver,) = checksum(engine.state_dict()), _receivers(1, timeout_s=20)
    audience = Audience(engines=("",), ranks=("",), choice="broadcast")
    sent: list[int] = []
    whole = transport._Link.broadcast

    def part(self: transport._Link, buffer: Tensor) -> None:
        if threading.current_thread() is sender._sending:
            sent.append(len(buffer))
            whole(self, buffer[: len(buffer) // 2])
            self.close()
            raise TimeoutError("killed")
        whole(self, buffer)

    monkeypatch.setattr(transport._Link, "broadcast", part)
    with pytest.raises(TimeoutError, match="cut off on their way"):
        receiver.accept([_offer(sender, learner.state_dict(), audience)])
    assert sent and checksum(engine.state_dict()) == before
    monkeypatch.setattr(transport._Link, "broadcast", whole)
    take(engine, receiver.accept([_offer(sender, learner.state_dict(), audience)]))
    assert checksum(engine.state_dict()) == checksum(learner.state_dict())


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    sender = Sender(CPU, host="127.0.0.1", folder=None, timeout_s=1)
    offer = _offer(sender, {"a": torch.ones(3)}, TWO)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="cut off on their way"):  # the other one does not come
        Receiver(CPU, index=0, timeout_s=1).accept([offer])
    sender.settle()
    assert time.monotonic() - began < 15
    sender.close()


def test_a_damaged_file_is_refused_and_only_the_last_one_stays(sender: Sender, tmp_path: Path) -> None:
    audience = Audience(engines=("",), ranks=("",), choice="disk")
    learner, engine = tiny.model(seed=3), tiny.model(seed=1)
    before, (receiver,) = checksum(engine.state_dict()), _receivers(1)
    for _ in range(3):
        offer = _offer(sender, learner.state_dict(), audience)
    assert [offer.file] == list((tmp_path / "sync").iterdir())
    assert offer.file is not None
    whole = offer.file.read_bytes()
    offer.file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        receiver.accept([offer])
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    offer.file.write_bytes(flipped)
    with pytest.raises(ValueError, match="checksum is not the learner's"):
        take(engine, receiver.accept([offer]))
    assert checksum(engine.state_dict()) == before
    sender.close()
    assert not list((tmp_path / "sync").iterdir())


def test_a_buffer_holds_every_type_and_shape() -> None:
    tensors = {
        "a": torch.arange(7, dtype=torch.int64),
        "b": torch.randn(3, 5).bfloat16(),
        "c": torch.tensor(2.5),
        "d": torch.zeros(0, 4),
    }
    slots, num_bytes = transport._slots(tensors)
    assert num_bytes == 256 * 3 and [slot.start for slot in slots] == [0, 256, 512, 768]
    places = views(torch.zeros(num_bytes, dtype=torch.uint8), slots)
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
    assert checksum(places) == checksum(tensors)


def test_an_engine_gets_its_own_types_from_a_finer_learner(tmp_path: Path) -> None:
    learner = tiny.model(seed=3)
    checkpoint.save(tiny.model(seed=1), tmp_path)
    engine = checkpoint.load(tmp_path, dtype=torch.bfloat16)
    publisher = Publisher(
        learner, None, None, Sender(CPU, host="", folder=None, timeout_s=1), dtype=torch.bfloat16
    )
    offer = publisher.offer(Audience(engines=("",), ranks=("",)))
    take(engine, Receiver(CPU, index=0, timeout_s=1).accept([offer]))
    assert torch.equal(engine.lm_head.weight, learner.lm_head.weight.bfloat16())
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(engine.state_dict()[bias], learner.state_dict()[bias])
    assert engine.state_dict()[bias].dtype == torch.float32
