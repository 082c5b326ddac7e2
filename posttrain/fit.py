"""Can the recipe's engines hold and serve its models? Asked by `posttrain check`, without torch and without a GPU.

The shape of a model is known before it exists: from the checkpoint that a stage reads, or from what pretrain and convert
will make. The engines ask again when they start, about the device they have. Next: rollouts/geometry.py.
"""

import subprocess
from pathlib import Path

from posttrain import config
from posttrain.config import Convert, Distill, Pretrain, Rl, Run
from posttrain.graph import is_path
from posttrain.rollouts.geometry import (
    Geometry,
    Memory,
    engine_memory,
    need_device,
    need_one_device,
    need_stock,
    stock_obstacles,
)
from posttrain.units import EvaluateUnit, Unit, expand


def check_engines(cfg: Run) -> None:
    """Raise ValueError for the first model that the recipe's engines in vLLM cannot take."""
    stock = cfg.rollouts.attention == "stock"
    if stock:
        _stock_is_possible(cfg)
    if cfg.rollouts.engine != "vllm":
        return
    device_bytes = _device_bytes(cfg)
    for unit, name in _served(cfg):
        shape = _shape(cfg, name)
        if shape is None:
            continue
        what = f"stage {unit.name!r} generates with {name!r}"
        memory = memory_of(cfg.rollouts, shape, cfg.cluster.dtype)
        need_one_device(memory, cfg.rollouts.tensor_parallel, what=what)
        if device_bytes:
            need_device(memory, device_bytes, what=what)
        if stock and shape.index_topk:
            need_stock(stock_obstacles(shape, cfg.cluster.dtype), what=what)


def memory_of(rollouts: config.Rollouts, shape: Geometry, dtype: str) -> Memory:
    """What an engine of the recipe needs for a model."""
    return engine_memory(
        shape,
        dtype=dtype,
        cache_bytes=rollouts.cache_mib << 20,
        batched_tokens=rollouts.batched_tokens,
        max_rows=rollouts.max_rows,
    )


def _stock_is_possible(cfg: Run) -> None:
    """ValueError if nothing of the recipe could be served by vLLM's own attention, or it is asked for what it lacks."""
    obstacles = []
    if cfg.rollouts.engine != "vllm":
        obstacles.append(f'rollouts.engine = "{cfg.rollouts.engine}", not "vllm"')
    if cfg.cluster.device == "cpu":
        obstacles.append('cluster.device = "cpu": it needs a GPU')
    if cfg.cluster.deterministic:
        obstacles.append("cluster.deterministic = true: its kernels depend on the batch")
    for stage in cfg.stages:
        if isinstance(stage, Rl):
            for name in ("topk", "routing"):
                if getattr(stage.keep, name):
                    obstacles.append(f"stage {stage.name!r} has keep.{name} = true: it records nothing")
    need_stock(obstacles, what=cfg.name)


def _served(cfg: Run) -> list[tuple[Unit, str]]:
    """Every unit that generates, and what with: a stage or a path."""
    found: list[tuple[Unit, str]] = []
    for unit in expand(cfg):
        if isinstance(unit, EvaluateUnit | Rl):
            found.append((unit, unit.source))
        elif isinstance(unit, Distill):
            found += [(unit, source) for source in unit.specialists.values()]
    return found


def _shape(cfg: Run, name: str) -> Geometry | None:
    """The shape of a stage's output or of a checkpoint; None where nobody can know it yet."""
    if is_path(name):
        return Geometry.read(Path(name))
    stage = next(stage for stage in cfg.stages if stage.name == name)
    if isinstance(stage, Pretrain):  # the tokenizer decides the rest: a few hundred rows, or many thousand
        return Geometry.of(stage.arch.model_dump() | {"vocab_size": 0})
    if isinstance(stage, Distill):
        return None
    shape = _shape(cfg, stage.source)
    if shape is None or not isinstance(stage, Convert):
        return shape
    return Geometry.of(
        {name: getattr(shape, name) for name in Geometry.__slots__}
        | {
            "index_topk": stage.index_topk,
            "index_n_heads": stage.index_n_heads,
            "index_head_dim": stage.index_head_dim,
            "index_dtype": stage.index_dtype,
        }
    )


def _device_bytes(cfg: Run) -> int:
    """Memory of an engine's device; 0 where it is not known here. On the CPU the engine's is that of the machine."""
    if cfg.rollouts.device_gib:
        return int(cfg.rollouts.device_gib * 2**30)
    if cfg.cluster.device == "cpu":
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        return min(int(line) for line in answer.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver here: the engine will look itself
        return 0
