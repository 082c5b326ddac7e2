"""One step of the rl stage without Ray: refilled groups, several updates, domains of their own, skipped updates."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import torch

from posttrain import config
from posttrain.domains import open_domains
from posttrain.learner import Learner
from posttrain.ledger import Ledger
from posttrain.mixture import TaskOrder
from posttrain.model import checkpoint
from posttrain.model.weights import pack
from posttrain.rollouts.fake_engine import FakeEngine
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.schema import Rollout
from posttrain.stages import rl
from posttrain.toy import tokenizer

TOKENIZER = tokenizer.build()
DOMAIN = {
    "tasks": "py://posttrain.toy.sorting:tasks?n=300",
    "rewards": [{"fn": "posttrain.rewards.answer:exact"}],
    "max_new_tokens": 12,
    "num_eval": 10,
}


class _Sometimes(FakeEngine):
    """All answers are right for tasks that sort down, so that only half of the groups have a signal."""

    def generate(
        self, requests: Sequence[Request], settings: Sampling, *, max_rows: int = 256
    ) -> list[Rollout]:
        answers = []
        for request in requests:
            even = request.index - request.index % 2 if "down" in request.task.question else request.index
            answers.append(self._answer(request, even))
        return answers

    def _answer(self, request: Request, index: int | None = None) -> Rollout:  # type: ignore[override]
        canned = Request(task=request.task, index=index or 0, seed=0, max_new_tokens=1)
        rollout = super()._answer(canned)
        return Rollout(
            **{name: getattr(rollout, name) for name in Rollout.__slots__} | {"index": request.index}
        )


class _Step:
    """Everything one step needs, in this process."""

    def __init__(
        self, path: Path, engine: Any = None, domains: Sequence[str] = ("logic",), **fields: Any
    ) -> None:
        self.path = path
        model = tiny.model()
        with torch.no_grad():  # answers of several lengths
            model.lm_head.weight[TOKENIZER.eos_token_id] += 0.5
        checkpoint.save(model, path / "sparse", TOKENIZER)
        rollouts = fields.pop("rollouts", {})
        mix = fields.pop("mix", {name: {} for name in domains})
        stage = {"name": "rl", "kind": "rl", "source": str(path / "sparse"), "mix": mix, "steps": 9}
        stage |= {"tasks_per_step": 8, "group_size": 4, "optimizer": {"lr": 1e-4}, "evaluate": False} | fields
        self.cfg = config.Run.model_validate(
            {
                "name": "t",
                "rollouts": rollouts,
                "domains": [DOMAIN | {"name": name} for name in domains],
                "stages": [stage],
            }
        )
        (self.stage,) = self.cfg.stages
        assert isinstance(self.stage, config.Rl)
        self.ledger = Ledger(path)
        self.job: Any = SimpleNamespace(
            cfg=self.cfg, out=path, seed=0, ledger=self.ledger.begin("rl"), source=Path
        )
        self.learner = Learner(rl._setup(self.stage, self.job))
        self.order = TaskOrder(open_domains(self.cfg), self.stage.mix, seed=0)
        self.engine = engine or TorchEngine(checkpoint.load(path / "sparse"), TOKENIZER)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def call(self, method: str, *args: Any) -> Any:
        """As RemoteLearner."""
        self.calls.append((method, args))
        return getattr(self.learner, method)(*args)

    def publish(self, *_: Any) -> Any:
        """As RemoteLearner."""
        return pack(self.learner.weights())

    def load(self, version: int, publish: Any) -> None:
        """As Pool."""
        self.engine.load(version, publish())

    def generate(self, requests: Sequence[Request], settings: Sampling, *_: Any) -> list[Rollout]:
        """As Pool."""
        self.calls.append(("generate", (requests, settings)))
        found: list[Rollout] = self.engine.generate(requests, settings)
        return found

    def run(self, step: int = 0) -> tuple[dict[str, float], list[str]]:
        """Take the step."""
        assert isinstance(self.stage, config.Rl)
        return rl._step(self.stage, self.job, step, self.order, self, self)  # type: ignore[arg-type]

    def rows(self, step: int = 0) -> list[dict[str, Any]]:
        """What the rollout file says."""
        rows: list[dict[str, Any]] = pq.read_table(
            self.path / f"rollouts/step-{step:05d}.parquet"
        ).to_pylist()
        return rows


def test_groups_without_a_signal_are_replaced_until_the_rounds_are_used_up(tmp_path: Path) -> None:
    signals = {}
    for rounds in (0, 1, 9):
        step = _Step(tmp_path / str(rounds), _Sometimes(TOKENIZER), refill_rounds=rounds)
        figures, _ = step.run()
        assert 0 <= figures["engine/ties"] <= 1 and "ties" not in figures
        trained = [row for row in step.rows() if row["fate"] == "trained"]
        signals[rounds] = len({row["task_id"] for row in trained})
        generated = [len(args[0]) for name, args in step.calls if name == "generate"]
        assert sum(generated) == 4 * (8 + figures["refilled"]) == len(step.rows())
        assert generated[0] == 32 and len(generated) <= 1 + rounds
        ((_, (batches, *_)),) = [call for call in step.calls if call[0] == "grpo_step"]
        weight = sum(float(batch.weight_T.sum()) for batch in batches)
        assert weight == pytest.approx(signals[rounds] / 8), "1/G, 1/|o| and one of eight places per group"
        counts = step.ledger.counts()
        assert counts.trained == len(trained) and counts.lost == counts.duplicated == 0
        assert counts.filtered == len(step.rows()) - len(trained)
    assert 0 < signals[0] < signals[1] < signals[9] == 8


def test_every_update_has_every_domain(tmp_path: Path) -> None:
    step = _Step(tmp_path, FakeEngine(TOKENIZER), domains=("logic", "letters"), updates_per_step=4)
    step.run()
    updates = [args[0] for name, args in step.calls if name == "grpo_step"]
    assert len(updates) == 4
    domains = {row["id"]: row["domain"] for row in step.rows()}
    for batches in updates:
        assert {domains[id] for batch in batches for id in batch.ids} == {"logic", "letters"}


@pytest.mark.parametrize(("updates", "wanted"), [(1, 0), (3, 3)])
def test_old_log_probs_are_recomputed_before_the_first_update(
    tmp_path: Path, updates: int, wanted: int
) -> None:
    """With a single update the policy is still the old one, and a pass is saved."""
    step = _Step(
        tmp_path,
        FakeEngine(TOKENIZER),
        updates_per_step=updates,
        loss={"old_policy": "recomputed", "clip": 1e-4},
    )
    figures, _ = step.run()
    assert [name for name, _ in step.calls if name != "generate"] == ["logprobs"] * wanted + [
        "grpo_step"
    ] * updates
    assert figures["clipped"] < 0.1, (
        "the first update is on-policy, though the fake engine's log-probs are not"
    )
    assert figures["engine/gap_mean"] > 1


def test_domains_have_their_own_clip_budget_and_penalty(tmp_path: Path) -> None:
    """Nonsense is 3 tokens with its end, the right answer 7 to 9: with a budget of 4 and a buffer of 2 they lose
    0.5 and 1, so that right answers are worth 1 - 1 and wrong ones 0 - 0.5; the reported reward stays 1 and 0."""
    mix = {
        "logic": {"clip": 0.1, "max_new_tokens": 4, "overlong_buffer": 2},
        "letters": {"clip_high": 0.5, "kl_coef": 0.5, "loss_weight": 3.0},
    }
    step = _Step(
        tmp_path, FakeEngine(TOKENIZER), domains=("logic", "letters"), mix=mix, loss={"norm": "constant"}
    )
    step.run()
    requests = [request for name, args in step.calls if name == "generate" for request in args[0]]
    assert {r.max_new_tokens for r in requests} == {4, 12}
    by_id = {row["id"]: row for row in step.rows()}
    assert {row["reward"] for row in by_id.values()} == {0.0, 1.0}
    assert {row["advantage"] for row in by_id.values() if row["domain"] == "logic"} == {0.25, -0.25}
    ((_, (batches, *_)),) = [call for call in step.calls if call[0] == "grpo_step"]
    for batch in batches:
        for i, id in enumerate(batch.ids):
            clip, weight = ((0.1, 0.1), 1 / 4) if by_id[id]["domain"] == "logic" else ((0.2, 0.5), 3 / 12)
            assert batch.clip_S2[i].tolist() == pytest.approx(clip)
            part = slice(*batch.cu_seqlens_S[i : i + 2])
            assert batch.weight_T[part].max() == pytest.approx(weight / (8 * 4))


def test_a_skipped_update_is_told_and_its_samples_are_not_trained(tmp_path: Path) -> None:
    step = _Step(tmp_path, FakeEngine(TOKENIZER), updates_per_step=2)
    with torch.no_grad():
        step.learner.model.lm_head.weight[5] = float("nan")
    figures, skipped = step.run()
    assert figures["skipped"] == figures["nonfinite"] == 2
    assert sorted(skipped) == sorted(row["id"] for row in step.rows())
    assert {row["fate"] for row in step.rows()} == {"failed: step skipped"}
    assert step.ledger.counts().failed == len(skipped) == 32 and step.ledger.counts().trained == 0


@pytest.mark.parametrize("policy", ["grpo", "gspo", "cispo"])
def test_kept_choices_travel_from_the_engine_to_the_learner(tmp_path: Path, policy: str) -> None:
    """Engine and learner agree in a truncated distribution, to rounding; without the mask they do not."""
    gaps = {}
    for mask in (True, False):
        step = _Step(
            tmp_path / str(mask),
            rollouts={"top_p": 0.8, "top_k": 50},
            keep={"routing": True, "topk": True, "sampling_mask": mask},
            mix={"logic": {"kl_coef": 0.1, "overlong_buffer": 11}},
            loss={"policy": policy},
            indexer="train",
            tasks_per_step=4,
        )
        figures, _ = step.run()
        gaps[mask] = figures["engine/gap_mean"]
        ((_, (batches, *_)),) = [call for call in step.calls if call[0] == "grpo_step"]
        for batch in batches:
            assert batch.kept_NTK is not None and batch.experts_NTE is not None
            assert (batch.sampling_mask is not None) == mask
    assert gaps[True] < 1e-5 < 0.05 < gaps[False]


@pytest.mark.parametrize("name", ["routing", "topk", "sampling_mask"])
def test_what_the_engine_does_not_record_cannot_be_kept(tmp_path: Path, name: str) -> None:
    step = _Step(
        tmp_path,
        FakeEngine(TOKENIZER),
        rollouts={"engine": "fake", "top_p": 0.9},
        keep={"sampling_mask": False} | {name: True},
    )
    with pytest.raises(ValueError, match=f"rl: keep.{name}: engine 'fake' has recorded nothing"):
        step.run()


def test_a_buffer_longer_than_the_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overlong_buffer=13 is more than the length budget, 12"):
        _Step(tmp_path, mix={"logic": {"overlong_buffer": 13}})
