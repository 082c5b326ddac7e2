"""How weights get from a learner's process into those of its engines: four ways, one offer and one check for all.

- memory: the tensors go along with the offer, on the CPU (Ray's object store carries them).
- ipc: engines on the GPU of a learner's rank read a buffer of that rank in place; CUDA opens it in both processes.
- broadcast: engines on other GPUs, and other machines, receive that buffer from the first rank, by NCCL (gloo on the CPU).
- disk: a safetensors file in a folder that all see.

A buffer holds all weights, one after another, as they were when they were offered: training may go on, and an engine that
is replaced takes the same weights. What arrives is a Weights, which the engine verifies before it copies anything
(weights.py). Left out: who offers when (posttrain/learner.py), who asks (../rollouts/pool.py).
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.model.weights import Weights, checksum

Route = Literal["memory", "ipc", "broadcast", "disk"]
_ALIGNED = 256
_CHUNK = 256 << 20
"""Bytes of one broadcast: between two of them a deadline is seen."""
_POLL_S = 0.0005


@dataclass(frozen=True, kw_only=True, slots=True)
class Audience:
    """Who takes the weights and from where; engines and ranks by the id of their GPU, "" on the CPU."""

    engines: tuple[str, ...]
    ranks: tuple[str, ...]
    generation: int = 0
    """Grows when an engine is replaced."""
    choice: Literal["auto", "memory", "ipc", "broadcast", "disk"] = "auto"
    sleeping: bool = False
    """Engines on the ranks' GPUs have given their memory up and want it back now."""
    only: int | None = None
    """The one engine that comes this time, a replaced one; None: all come."""

    def routes(self) -> list[Route]:
        """The way of each engine. Raises ValueError where the one asked for is impossible."""
        return [self._route(i, gpu) for i, gpu in enumerate(self.engines)]

    def _route(self, index: int, gpu: str) -> Route:
        shared = gpu != "" and gpu in self.ranks
        if self.choice == "auto":
            return "memory" if gpu == "" else "ipc" if shared else "broadcast"
        if self.choice == "ipc" and not shared:
            raise ValueError(
                f'rollouts.sync = "ipc": rollout actor {index} has no GPU in common with a learner; write "auto"'
            )
        if self.choice == "broadcast" and shared and gpu == self.ranks[0]:
            raise ValueError(
                f'rollouts.sync = "broadcast": rollout actor {index} shares its GPU with the learner, which NCCL '
                'refuses; write "auto"'
            )
        return self.choice


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor in a buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """First byte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the receivers of a broadcast come together."""

    host: str
    port: int
    number: int
    """Of the link: a new one when an engine is replaced or the last was cut."""
    engines: tuple[int, ...]
    """Their indices, in the order of their ranks after the sender's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What one rank of a learner offers; of the ways that it names, an engine takes its own."""

    checksum: str
    slots: tuple[Slot, ...] = ()
    num_bytes: int = 0
    gpu: str = ""
    tensors: Mapping[str, Tensor] | None = None
    handle: tuple[Any, ...] | None = None
    """CUDA's name of the buffer on that GPU."""
    meeting: Meeting | None = None
    file: Path | None = None


def gpu_id(device: torch.device) -> str:
    """The same for every process on a GPU, whatever number it gives it; "" for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


class Sender:
    """A rank's end."""

    def __init__(self, device: torch.device, *, host: str, folder: Path | None, timeout_s: float) -> None:
        self._device, self._host, self._folder, self._timeout_s = device, host, folder, timeout_s
        self.gpu = gpu_id(device)
        self._slots: tuple[Slot, ...] = ()
        self._buffer: Tensor | None = None
        self._handle: tuple[Any, ...] | None = None
        self._store: Any = None
        self._link: _Link | None = None
        self._members: tuple[int, tuple[int, ...]] = (0, ())
        self._num_links = 0
        self._sending: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._num_files = 0

    def wants(self, audience: Audience, *, rank: int) -> bool:
        """Whether this rank has anything to offer."""
        return bool(self._mine(audience, rank))

    def offer(
        self,
        like: Mapping[str, Tensor],
        tensors: Iterable[tuple[str, Tensor]],
        audience: Audience,
        *,
        rank: int,
    ) -> Offer:
        """Everything this rank's engines need; a broadcast begins in a thread and waits there for the receivers.

        `like` has the names, shapes and types of all tensors, which come one by one: shards need not be whole at once.
        """
        self.settle()
        mine = self._mine(audience, rank)
        routes = set(mine.values())
        if not routes & {"ipc", "broadcast"}:
            whole = {name: tensor.detach().cpu() for name, tensor in tensors}
            return Offer(
                checksum=checksum(whole),
                tensors=whole if "memory" in routes else None,
                file=self._write(whole) if "disk" in routes else None,
            )
        found = self._fill(like, tensors)
        if audience.sleeping and self._device.type == "cuda":
            torch.cuda.empty_cache()  # what training has left in torch's hands
        extra: dict[str, Any] = {}
        if "ipc" in routes:
            extra["handle"] = self._shared()
        if "broadcast" in routes:
            extra["meeting"] = self._meet(audience, [i for i, route in mine.items() if route == "broadcast"])
        if "memory" in routes:
            extra["tensors"] = {name: tensor.cpu() for name, tensor in found.items()}
        if "disk" in routes:
            extra["file"] = self._write(found)
        assert self._buffer is not None, "filled above"
        return Offer(
            checksum=checksum(found),
            slots=self._slots,
            num_bytes=len(self._buffer),
            gpu=self.gpu,
            **extra,
        )

    def settle(self) -> None:
        """Wait until the last broadcast is over; raises what has ended it, if the engines cannot know it."""
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None and not isinstance(failure, TimeoutError):
            raise failure

    def close(self) -> None:
        """Give up what is held for the engines."""
        self._join()
        if self._link is not None:
            self._link.close()
        if self._folder is not None:
            for file in self._folder.glob("weights-*"):
                file.unlink()
        self._buffer, self._handle, self._link, self._store = None, None, None, None

    def _join(self) -> None:
        if self._sending is not None:
            self._sending.join(4 * self._timeout_s)  # to meet, to send, and as long again
            if self._sending.is_alive():
                raise TimeoutError("the last broadcast of weights has not ended; NCCL hangs")
            self._sending = None

    def _mine(self, audience: Audience, rank: int) -> dict[int, Route]:
        """The engines that take from this rank: on its GPU, or, from the first, in any other way."""
        found = {}
        for i, (gpu, route) in enumerate(zip(audience.engines, audience.routes(), strict=True)):
            sender = audience.ranks.index(gpu) if route == "ipc" else 0
            if sender == rank and audience.only in (None, i):
                found[i] = route
        return found

    def _fill(self, like: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copy the weights into the buffer, which is made once."""
        if self._buffer is None:
            self._slots, num_bytes = _slots(like)
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        places = views(self._buffer, self._slots)
        seen = set()
        for name, tensor in tensors:
            places[name].copy_(tensor)
            seen.add(name)
        assert seen == places.keys(), "a learner's weights have the same names in every offer"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # other processes know nothing of our stream
        return places

    def _shared(self) -> tuple[Any, ...]:
        """The buffer's handle, made once: each one made counts as a reader that must come."""
        if self._handle is None:
            assert self._buffer is not None, "filled before"
            self._handle = self._buffer.untyped_storage()._share_cuda_()[1:]  # without this process's number
        return self._handle

    def _write(self, tensors: Mapping[str, Tensor]) -> Path:
        """A new file, whole when it has its name; the one before goes."""
        assert self._folder is not None, "a route by disk has a folder"
        self._folder.mkdir(parents=True, exist_ok=True)
        old = list(self._folder.glob("weights-*.safetensors"))
        self._num_files += 1
        path = self._folder / f"weights-{self._num_files}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.rename(path)
        for file in old:
            if file != path:
                file.unlink()
        return path

    def _meet(self, audience: Audience, engines: Sequence[int]) -> Meeting:
        """Begin the broadcast."""
        if self._store is None:
            limit = timedelta(seconds=self._timeout_s)
            self._store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False, timeout=limit)  # type: ignore[attr-defined]  # torch lists it nowhere
        members = (audience.generation, tuple(engines))
        if self._link is None or self._members != members:
            if self._link is not None:
                self._link.close()
            self._members, self._num_links = members, self._num_links + 1
            meeting = Meeting(
                host=self._host, port=self._store.port, number=self._num_links, engines=members[1]
            )
            self._link = _Link(meeting, self._store, 0, self._device, self._timeout_s)
        self._sending = threading.Thread(target=self._send, args=(self._link,), daemon=True)
        self._sending.start()
        return self._link.meeting

    def _send(self, link: "_Link") -> None:
        try:
            assert self._buffer is not None, "filled before"
            link.broadcast(self._buffer)
        except BaseException as error:  # told by settle()
            self._link, self._failure = None, error


class Receiver:
    """An engine's end."""

    def __init__(self, device: torch.device, *, index: int, timeout_s: float) -> None:
        self._device, self._index, self._timeout_s = device, index, timeout_s
        self.gpu = gpu_id(device)
        self._opened: tuple[tuple[Any, ...], Tensor] | None = None
        self._link: _Link | None = None

    def accept(self, offers: Sequence[Offer | None]) -> Weights:
        """The weights, by the way that is this engine's; they must be dropped before the next are accepted.

        Raises TimeoutError if they do not come, and ValueError if what is offered cannot be had.
        """
        for offer in offers:
            if offer is None:
                continue
            if offer.handle is not None and offer.gpu == self.gpu:
                return Weights(views(self._open(offer.handle), offer.slots), offer.checksum)
            if offer.meeting is not None and self._index in offer.meeting.engines:
                return Weights(views(self._receive(offer, offer.meeting), offer.slots), offer.checksum)
            if offer.file is not None:
                return Weights(self._read(offer.file), offer.checksum)
            if offer.tensors is not None:
                return Weights(dict(offer.tensors), offer.checksum)
        raise ValueError(f"rollout actor {self._index}: no weights are offered by a way that it can take")

    def close(self) -> None:
        """Let go of the learner's memory."""
        if self._link is not None:
            self._link.close()
        self._opened, self._link = None, None

    def _open(self, handle: tuple[Any, ...]) -> Tensor:
        """The rank's buffer, opened once."""
        if self._opened is None or self._opened[0] != handle:
            self._opened = None
            number = self._device.index or 0
            storage = torch.UntypedStorage._new_shared_cuda(number, *handle)
            buffer = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
            self._opened = (handle, buffer)
        return self._opened[1]

    def _receive(self, offer: Offer, meeting: Meeting) -> Tensor:
        buffer = torch.empty(offer.num_bytes, dtype=torch.uint8, device=self._device)
        if self._link is None or self._link.meeting != meeting:
            if self._link is not None:
                self._link.close()
            rank = 1 + meeting.engines.index(self._index)
            self._link = _Link(meeting, None, rank, self._device, self._timeout_s)
        try:
            self._link.broadcast(buffer)
        except BaseException:
            self._link = None
            raise
        return buffer

    def _read(self, file: Path) -> dict[str, Tensor]:
        try:
            return load_file(file, device=str(self._device))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"weights refused: {file} cannot be read ({error})") from None


class _Link:
    """A process group of its own beside whatever else the process has: a learner's shards, vLLM's."""

    def __init__(
        self, meeting: Meeting, store: Any, rank: int, device: torch.device, timeout_s: float
    ) -> None:
        self.meeting, self._device, self._timeout_s = meeting, device, timeout_s
        self._store, self._rank = store, rank
        self._group: Any = None

    def broadcast(self, buffer: Tensor) -> None:
        """From rank 0 to the others, within the deadline; TimeoutError otherwise, and the link is of no more use."""
        until = time.monotonic() + self._timeout_s
        try:
            if self._group is None:
                self._group = self._meet()
            for chunk in buffer.split(_CHUNK):
                self._group.broadcast(chunk, 0).wait()
                if self._device.type == "cuda":
                    self._wait(until)
        except (
            RuntimeError
        ) as error:  # torch's for everything: a store, a peer that is gone, a time that is over
            self.close()
            raise TimeoutError(f"weights were cut off on their way: {str(error).splitlines()[0]}") from None

    def _meet(self) -> Any:
        meeting, limit = self.meeting, timedelta(seconds=self._timeout_s)
        if self._store is None:
            self._store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=limit)  # type: ignore[attr-defined]  # torch lists it nowhere
        room = dist.PrefixStore(str(meeting.number), self._store)  # type: ignore[attr-defined]
        size = 1 + len(meeting.engines)
        # All are here before NCCL begins: what it waits for has no deadline.
        room.set(f"here/{self._rank}", "yes")
        room.wait([f"here/{rank}" for rank in range(size)], limit)
        if self._device.type != "cuda":
            return dist.ProcessGroupGloo(room, self._rank, size, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = 2 * limit  # its own deadline ends the process; ours is earlier
        return dist.ProcessGroupNCCL(room, self._rank, size, options)

    def close(self) -> None:
        """Leave; others that wait for us see it."""
        if self._device.type == "cuda" and self._group is not None:
            self._group.abort()
        self._group = None

    def _wait(self, until: float) -> None:
        """NCCL only queues; a member that is gone would make the device wait for ever."""
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        while not done.query():
            if time.monotonic() > until:
                raise RuntimeError(f"not there within {self._timeout_s:.0f} s (cluster.step_timeout_s)")
            time.sleep(_POLL_S)


def views(buffer: Tensor, slots: Sequence[Slot]) -> dict[str, Tensor]:
    """The tensors that lie in a buffer of bytes."""
    found = {}
    for slot in slots:
        size = torch.Size(slot.shape).numel() * slot.dtype.itemsize
        found[slot.name] = buffer[slot.start : slot.start + size].view(slot.dtype).view(slot.shape)
    return found


def _slots(like: Mapping[str, Tensor]) -> tuple[tuple[Slot, ...], int]:
    """Places one after another, and the bytes of all."""
    slots, start = [], 0
    for name, tensor in like.items():
        slots.append(Slot(name, tuple(tensor.shape), tensor.dtype, start))
        start += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
    return tuple(slots), start
