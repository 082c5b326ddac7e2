"""What a stage function gets and what it returns. Next: stages/, then pipeline.py."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from posttrain.config import Run
from posttrain.graph import is_path
from posttrain.ledger import StageLedger
from posttrain.metrics import Metrics
from posttrain.snapshots import Snapshots

if TYPE_CHECKING:  # it imports Ray, which a stage that only copies files does not need
    from posttrain.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class Job:
    """One unit of work: everything a stage may read, and where it writes."""

    cfg: Run
    name: str
    """Name of the stage, or "<stage>.eval"."""
    out: Path
    """Empty folder to write in; it becomes the stage's folder when the stage has returned."""
    cluster: "Cluster"
    metrics: Metrics
    ledger: StageLedger
    snapshots: Snapshots
    """Only training stages take any: rl.py and lm.py."""
    seed: int
    """Derived from the run's seed and the name: stages do not share random numbers."""

    def source(self, name: str) -> Path:
        """Folder of an earlier stage of this run, or the file, folder or hf:// checkpoint named."""
        if not is_path(name):
            return self.cfg.path / name
        if name.startswith("hf://"):
            return _download(name)
        path = Path(name).resolve()
        if not path.exists():
            raise ValueError(f"source {name!r}: no such file or folder")
        return path


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a stage reports about itself."""

    steps: int = 0
    tokens: int = 0
    """Tokens trained on or sampled."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The numbers worth reading, for instance {"loss": 1.2} or {"math": {"pass@1": 0.5, ...}}."""


def _download(uri: str) -> Path:
    """Local folder of hf://owner/name?revision=..., fetched into the hub's own cache if it is not there."""
    from huggingface_hub import snapshot_download  # heavy, and only this uses it

    name, _, query = uri.removeprefix("hf://").partition("?")
    try:
        return Path(snapshot_download(name, revision=dict(parse_qsl(query)).get("revision")))
    except (OSError, ValueError) as error:  # no network, no such name: the hub's errors are of these kinds
        raise ValueError(f"source {uri!r}: cannot be fetched ({str(error).splitlines()[0]})") from None


def stage_seed(seed: int, name: str) -> int:
    """The seed of a stage: 32 bits, so that every library takes it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4])
