"""A learner's state on disk: tensors by torch's DCP, everything else as JSON.

Weights that train, their fp32 copies, buffers and optimizer moments are written as they are sharded, each rank its own part, and read
again by any number of ranks; frozen weights are those of the checkpoint that the stage began with. Beside them: what is counted, and every generator of random numbers. This module writes files; that
they are whole, verified and the newest is the matter of snapshots.py.
"""

import hashlib
import json
import random
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from posttrain import disk
from posttrain.optimizer import Optimizers
from posttrain.shards import whole

_COUNTERS = "counters.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """What a learner knows beside its tensors."""

    version: int
    """Of the weights: optimizer steps that moved them."""
    nonfinite_steps: int
    """In a row, up to now."""
    nonfinite_ids: tuple[str, ...]
    schedule_step: int
    norms: dict[str, list[float]]
    """What the spike guard compares with."""


class Writer:
    """Writes one state at a time in a thread of its own, from a copy in host memory."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        """group: one with a CPU backend and for this alone, where several ranks write together."""
        self._group = group
        self._threads = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def start(self, folder: Path, model: nn.Module, optimizers: Optimizers, counters: Counters) -> None:
        """Copy the state and begin to write it; training may go on at once."""
        self.finish()
        if _rank(self._group) == 0:
            disk.write_json(folder / _COUNTERS, asdict(counters))
        disk.write_json(folder / _rng_file(self._group), _rng_state())
        # The options ask for plain host memory: nothing pinned or shared.
        staged = DefaultStager(StagingOptions(False, False, False, False)).stage(tensors(model, optimizers))
        assert isinstance(staged, dict), "a stager without threads returns the copy itself"
        self._writing = self._threads.submit(_save, staged, folder, self._group)

    def ready(self) -> bool:
        """Whether finish would return at once."""
        return self._writing is None or self._writing.done()

    def finish(self) -> None:
        """Wait until it is written; raises what went wrong."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


def tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """Every tensor of the state by name, not copied: "model/<name>", "master/<name>", "optimizer/<name>/<moment>"."""
    found = _weights(model) | _masters(model, optimizers)
    names: dict[Tensor, str] = {parameter: name for name, parameter in optimizers.moved(model).items()}
    for optimizer in optimizers.optimizers:
        for parameter, moments in optimizer.state.items():
            found |= {f"optimizer/{names[parameter]}/{key}": tensor for key, tensor in moments.items()}
    return found


def read(
    folder: Path, model: nn.Module, optimizers: Optimizers, group: ProcessGroup | None = None
) -> Counters:
    """Load a state into model and optimizers; ValueError if it is that of another model or optimizer."""
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = _weights(model) | _masters(model, optimizers) | _moments(saved, model, optimizers)
    if state.keys() != saved.keys():
        odd = sorted(state.keys() ^ saved.keys())
        raise ValueError(f"{folder}: a snapshot of another model or optimizer ({odd[0]} is in one alone)")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
    rng = folder / _rng_file(group)
    if rng.exists():  # a rank that was not there before keeps its seed; nothing of ours draws in training
        _set_rng(json.loads(rng.read_bytes()))
    fields = json.loads((folder / _COUNTERS).read_bytes())
    return Counters(**fields | {"nonfinite_ids": tuple(fields["nonfinite_ids"])})


def digest(model: nn.Module, optimizers: Optimizers) -> str:
    """sha256 of all that trains, moments and buffers included, by name: equal for equal bits on any number of ranks."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors(model, optimizers).items()):
        values = whole(tensor).detach()
        total.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        total.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _weights(model: nn.Module) -> dict[str, Any]:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    every = model.state_dict().items()
    return {f"model/{name}": tensor.detach() for name, tensor in every if name not in frozen}


def _masters(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    masters = set(optimizers.masters.values())
    return {f"master/{name}": p.detach() for name, p in optimizers.moved(model).items() if p in masters}


def _save(state: dict[str, Any], folder: Path, group: ProcessGroup | None) -> None:
    with warnings.catch_warnings(), disk.explain_full(folder):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
        except CheckpointException as error:  # not an Exception, and its text is a whole traceback
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"{folder}: rank {rank} could not write the snapshot: {cause}") from cause


def _moments(saved: dict[str, Any], model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """Room for the saved moments, in the optimizers: they make theirs at their first step."""
    parameters = optimizers.moved(model)
    owners = {p: o for o in optimizers.optimizers for group in o.param_groups for p in group["params"]}
    state: dict[str, Any] = {}
    for optimizer in optimizers.optimizers:
        optimizer.state.clear()
    for key, meta in saved.items():
        if not key.startswith("optimizer/"):
            continue
        name, _, moment = key.removeprefix("optimizer/").rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in owners:
            continue  # told apart by the caller
        if meta.size == parameter.shape:
            room = torch.zeros_like(parameter, dtype=meta.properties.dtype, requires_grad=False)
        else:
            room = torch.zeros(meta.size, dtype=meta.properties.dtype, device=parameter.device)
        owners[parameter].state[parameter][moment] = state[key] = room
    return state


def _rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else torch.distributed.get_rank(group)


def _rng_file(group: ProcessGroup | None) -> str:
    return f"rng-{_rank(group)}.json"


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],  # type: ignore[union-attr]  # an array in the legacy form
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in cuda],
    }


def _set_rng(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_bytes(text) for text in state["cuda"]])


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
