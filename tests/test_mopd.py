"""On-policy distillation from several teachers: the KL and its gradients by hand, who teaches what, the rl step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import group_worker
import numpy as np
import pytest
import tiny
import torch
from test_rl import TOKENIZER, _Step

from posttrain import config, logprob, loss, packing, teachers
from posttrain.learner import Learner, Setup
from posttrain.model import checkpoint
from posttrain.rollouts.fake_engine import FakeEngine
from posttrain.schema import Batch

F64 = torch.float64
PI, TEACHER = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)
KL = 0.5 * np.log(2.5) + 0.3 * np.log(1.5) + 0.2 * np.log(1 / 3)
EXACT = [p * (np.log(p / q) - KL) for p, q in zip(PI, TEACHER, strict=True)]
"""d KL / d logit_v = pi_v (log(pi_v / q_v) - KL)."""


def _logits() -> torch.Tensor:
    return (torch.tensor(PI, dtype=F64).log() + 3.0).requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_full_form_has_the_exact_gradient(temperature: float) -> None:
    """Logits times the temperature give the same distributions, and a gradient that is smaller by it."""
    logits = (_logits().detach() * temperature).requires_grad_()
    teacher = torch.tensor(TEACHER, dtype=F64).log() * temperature - 1.0
    found = logprob.reverse_kl(logits[None], teacher[None], temperature)
    assert found.tolist() == pytest.approx([KL])
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert (gradient * temperature).tolist() == pytest.approx(EXACT)


def _sampled_loss(logits: torch.Tensor, engine: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The loss of each token that could have been drawn, advantage 0 but for the teacher's part of 2 KL."""
    logp = torch.log_softmax(logits, 0)
    num = len(logits)
    zeros, ones = torch.zeros(num, dtype=F64), torch.ones(num, dtype=F64)
    values = loss.Values(
        logp_M=logp,
        engine_M=engine,
        old_M=engine,
        ref_M=None,
        entropy_M=None,
        advantage_M=zeros,
        weight_M=engine.exp(),  # how often each is drawn
        kl_coef_M=zeros,
        low_M=99 * ones,
        high_M=99 * ones,
        sequence_M=torch.arange(num),
        teacher_M=torch.tensor(TEACHER, dtype=F64).log(),
        teacher_coef=2.0,
    )
    value, figures = loss.policy_loss(values, config.Loss(**settings))
    assert figures["teacher_kl"].item() == pytest.approx(sum(np.log(np.divide(PI, TEACHER))))
    return value


@pytest.mark.parametrize("engine", [PI, (0.1, 0.6, 0.3)])
@pytest.mark.parametrize("policy", ["grpo", "cispo", "gspo"])
def test_the_sampled_form_has_the_same_gradient_in_expectation(engine: Any, policy: str) -> None:
    """Over all tokens that can be drawn; the ratio also mends that another policy drew them."""
    logits = _logits()
    value = _sampled_loss(logits, torch.tensor(engine, dtype=F64).log(), policy=policy)
    (gradient,) = torch.autograd.grad(value, logits)
    assert (gradient / 2).tolist() == pytest.approx(EXACT)


def test_the_full_form_is_added_to_the_policy_term() -> None:
    """Ratio 1, advantage 3, weights 1/2, coefficient 0.1: -(3 - 0.1 kl) / 2 each."""
    ones, kl = torch.ones(2, dtype=F64), torch.tensor([0.4, 2.0], dtype=F64).requires_grad_()
    zeros = 0 * ones
    fixed = {"logp_M": zeros, "engine_M": zeros, "old_M": zeros, "ref_M": None, "entropy_M": None}
    clip = {"low_M": ones, "high_M": ones, "sequence_M": torch.zeros(2, dtype=torch.long)}
    values = loss.Values(
        **fixed,  # type: ignore[arg-type]
        **clip,
        advantage_M=3 * ones,
        weight_M=ones / 2,
        kl_coef_M=zeros,
        teacher_kl_M=kl,
        teacher_coef=0.1,
    )
    value, figures = loss.policy_loss(values, config.Loss())
    assert value.item() == pytest.approx(-3 + 0.1 * 1.2)
    assert figures["teacher_kl"].item() == pytest.approx(2.4)
    assert torch.autograd.grad(value, kl)[0].tolist() == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("rows", [1, 4, 63])
def test_logits_of_student_and_teacher_never_exist_together_for_all_tokens(rows: int) -> None:
    """In parts of a few rows: the same numbers, and the same gradients."""
    rng = torch.Generator().manual_seed(0)
    x, head, y, other = (torch.randn(n, 5, generator=rng, dtype=F64) for n in (63, 29, 63, 29))
    targets = torch.randint(29, (63,), generator=rng)
    found = []
    for limit in (10**6, 2 * 29 * rows + 3):
        leaves = [t.clone().requires_grad_() for t in (x, head)]
        teacher = logprob.Hidden(y, other)
        read = logprob.head_logprobs(
            logprob.Hidden(*leaves), targets, 0.7, None, teacher=teacher, max_logits=limit
        )
        assert read.entropy_M is None and read.teacher_kl_M is not None
        (read.teacher_kl_M * torch.arange(63) + read.logp_M).sum().backward()
        found.append([read.teacher_kl_M.detach(), *(leaf.grad for leaf in leaves)])
    plain = logprob.reverse_kl(x @ head.t(), y @ other.t(), 0.7)
    torch.testing.assert_close(found[0][0], plain, atol=1e-13, rtol=1e-12)
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


# ---- in the learner ----


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A student and two teachers."""
    folder = tmp_path_factory.mktemp("models")
    return [tiny.sparse_checkpoint(folder / str(seed), seed=seed) for seed in range(3)]


def _learner(paths: list[Path], form: Any = "full", **changes: Any) -> Learner:
    fields: dict[str, Any] = {
        "checkpoint": paths[0],
        "attention": "sparse",
        "optimizer": config.Optimizer(lr=1e-9, max_grad_norm=1e9),
        "total_steps": 10,
        "train": frozenset({"model"}),
        "mopd": config.Mopd(form=form),
        "teachers": tuple(paths[1:]),
    }
    return Learner(Setup(**(fields | changes)))


def _batches(num: int = 6, limit: int = 70, **fields: Any) -> list[Batch]:
    given: dict[str, Any] = {"logprobs": None, "advantage": 0.0}
    samples = [tiny.sample(str(i), 12 + 5 * i, seed=i, **(given | fields), teacher=i % 2) for i in range(num)]
    return packing.pack(samples, packing.token_weights(samples, "sequence", 3), tokens_per_batch=limit)


def test_a_batch_has_one_teacher_and_none_goes_missing() -> None:
    batches = _batches(num=9)
    assert sorted(id for batch in batches for id in batch.ids) == [str(i) for i in range(9)]
    assert all({int(id) % 2 for id in batch.ids} == {batch.teacher} for batch in batches)
    assert {batch.teacher for batch in batches} == {0, 1}


def _whole_kl(model: Any, teacher: Any, batch: Batch, learner: Learner, temperature: float) -> torch.Tensor:
    """Sum of weight * KL with both models run plainly on each document."""
    total = torch.zeros(())
    for begin, end in zip(batch.cu_seqlens_S[:-1], batch.cu_seqlens_S[1:], strict=True):
        tokens = torch.from_numpy(batch.tokens_T[begin:end])
        at = torch.from_numpy(np.flatnonzero(batch.mask_T[begin:end])) - 1
        logits = [m(tokens, tiny.packed([len(tokens)]), at) / temperature for m in (model, teacher)]
        student, other = (torch.log_softmax(x, -1) for x in logits)
        weight = torch.from_numpy(batch.weight_T[begin:end])[at + 1]
        total = (
            total
            + (
                weight * torch.nn.functional.kl_div(other, student, log_target=True, reduction="none").sum(-1)
            ).sum()
        )
    return total


def test_the_learners_gradient_is_that_of_the_kl_to_each_batchs_teacher(paths: list[Path]) -> None:
    """With advantage 0 and no reference nothing else is left."""
    learner, batches = _learner(paths), _batches()
    seen = group_worker.watch(learner)
    figures, _ = learner.grpo_step(batches, config.Loss(kl="none"), 0.8)
    model, *others = (checkpoint.load(path) for path in paths)
    total = sum(_whole_kl(model, others[b.teacher or 0], b, learner, 0.8) for b in batches)
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert figures["loss"] == pytest.approx(total.item(), rel=1e-5)
    ours = torch.cat([g.flatten() for _, g in sorted(seen.items())])
    theirs = torch.cat(
        [p.grad.flatten() for n, p in sorted(model.named_parameters()) if n in seen and p.grad is not None]
    )
    assert theirs.norm() > 1e-2 and (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("form", ["full", "sampled"])
def test_a_teacher_makes_its_own_choices(paths: list[Path], form: str) -> None:
    """Entries and experts that the batch replays are the student's: what the teacher says does not change."""
    learner = _learner(paths, form)
    given = group_worker.batches(100_000, keep=True, num_teachers=2)
    bare = [replace(b, kept_NTK=None, experts_NTE=None) for b in given]
    for with_kept, without in zip(given, bare, strict=True):
        answers = []
        for batch in (with_kept, without):
            hidden, logp_M = learner._taught(batch, learner._on_device(batch), 1.0)
            assert (hidden is None) == (form == "sampled") and (logp_M is None) == (form == "full")
            answers.append(logp_M if hidden is None else hidden.x_MD)
        torch.testing.assert_close(*answers)
        bound, free = (learner.logprobs([batch])[0] for batch in (with_kept, without))
        assert np.abs(bound - free).max() > 1e-3, "the student is bound by them"


@pytest.mark.parametrize("form", ["full", "sampled"])
def test_the_student_comes_closer_to_both_teachers(paths: list[Path], form: str) -> None:
    optimizer = config.Optimizer(lr=3e-3)
    learner = _learner(paths, form, optimizer=optimizer, total_steps=40)
    settings = config.Loss(kl="none", old_policy="recomputed")
    gaps = []
    for _ in range(40):
        figures, _ = learner.grpo_step(_batches(), settings, 1.0)
        gaps.append(figures["teacher_kl"])
    # The tokens are fixed and not the student's own, so that the sampled figure is no KL and may fall below 0.
    assert gaps[-1] < (0.5 if form == "full" else 0.9) * gaps[0], gaps


def test_a_student_that_is_its_teacher_has_nothing_to_learn(paths: list[Path]) -> None:
    for form in ("full", "sampled"):
        learner = _learner([paths[0], paths[0], paths[0]], form)
        figures, _ = learner.grpo_step(_batches(), config.Loss(kl="none", old_policy="recomputed"), 1.0)
        assert abs(figures["teacher_kl"]) < 1e-6 and figures["grad_norm/model"] < 1e-5


def test_teachers_of_another_family_are_refused(paths: list[Path], tmp_path: Path) -> None:
    student = tiny.model()
    other = tiny.sparse_checkpoint(tmp_path / "heads", num_attention_heads=5, num_key_value_heads=5)
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    with pytest.raises(
        ValueError, match=r"num_attention_heads=5, the student's is 3; they must be of one family"
    ):
        teachers.load([other], student, paths[0], **options)
    strange = tiny.sparse_checkpoint(tmp_path / "words")
    words = checkpoint.load_tokenizer(strange)
    words.add_tokens(["<new>"])
    words.save_pretrained(strange)
    with pytest.raises(ValueError, match="its tokenizer has other tokens than the student's"):
        teachers.load([strange], student, paths[0], **options)
    with pytest.raises(ValueError, match="with 0 teachers; give both or neither"):
        _learner(paths, teachers=())


# ---- in the rl stage ----


def test_teachers_replace_rewards_or_stand_beside_them(paths: list[Path], tmp_path: Path) -> None:
    """FakeEngine answers right and wrong in turn: with rewards the advantages are +-0.5, without they are 0."""
    for rewards, wanted in ((False, {0.0}), (True, {0.5, -0.5})):
        mix = {
            "logic": {"specialist": str(paths[1])},
            "letters": {"specialist": str(paths[2]), "loss_weight": 3.0},
        }
        step = _Step(
            tmp_path / str(rewards),
            FakeEngine(TOKENIZER),
            domains=("logic", "letters"),
            mix=mix,
            mopd={"rewards": rewards},
        )
        figures, _ = step.run()
        assert figures["teacher_kl"] > 0
        rows = {row["id"]: row for row in step.rows()}
        assert {row["advantage"] for row in rows.values()} == wanted
        assert {row["fate"] for row in rows.values()} == {"trained"} and figures["signal"] == 1
        ((_, (batches, *_)),) = [call for call in step.calls if call[0] == "grpo_step"]
        for batch in batches:
            domains = {rows[id]["domain"] for id in batch.ids}
            assert domains == {("logic", "letters")[batch.teacher]}
            weight = {"logic": 1, "letters": 3}[domains.pop()] / (8 * 4)
            ends = np.flatnonzero(batch.mask_T)
            assert {round(float(w * n), 6) for w, n in _of_sequences(batch, ends)} == {round(weight, 6)}
        assert step.learner.setup.teachers == (paths[1], paths[2])


def _of_sequences(batch: Batch, valid: Any) -> list[tuple[float, int]]:
    """Weight of a token and number of valid tokens, by sequence."""
    found = []
    for begin, end in zip(batch.cu_seqlens_S[:-1], batch.cu_seqlens_S[1:], strict=True):
        mine = valid[(valid >= begin) & (valid < end)]
        found.append((float(batch.weight_T[mine[0]]), len(mine)))
    return found


def test_equal_rewards_are_no_reason_to_drop_a_group_that_has_a_teacher(
    paths: list[Path], tmp_path: Path
) -> None:
    """letters has none: its groups are refilled until they differ or the rounds are used up."""
    step = _Step(
        tmp_path,
        FakeEngine(TOKENIZER),
        domains=("logic", "letters"),
        mix={"logic": {"specialist": str(paths[1])}, "letters": {}},
        mopd={"rewards": True},
        group_size=2,
        refill_rounds=1,
        rollouts={},
    )
    figures, _ = step.run()
    assert figures["teacher_kl"] > 0
    teachers_of = {b.teacher for name, args in step.calls if name == "grpo_step" for b in args[0]}
    assert teachers_of == {0, None}


@pytest.mark.parametrize(
    ("mix", "mopd", "message"),
    [
        (
            {"logic": {}},
            {},
            "mopd without rewards has nothing to teach 'logic' with; set mix.logic.specialist",
        ),
        ({"logic": {}}, {"rewards": True}, "mopd without a specialist; set mix.DOMAIN.specialist"),
        ({"logic": {"specialist": "later"}}, {}, "source 'later' is no stage"),
    ],
)
def test_distillation_without_a_teacher_is_refused(tmp_path: Path, mix: Any, mopd: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _Step(tmp_path, FakeEngine(TOKENIZER), mix=mix, mopd=mopd)
