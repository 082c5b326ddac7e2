"""What the learner takes over from the engine: experts, kept entries, sampling masks; alone, together, packed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain import config, logprob, packing
from posttrain.learner import Learner, Setup
from posttrain.model import checkpoint
from posttrain.rollouts import sampling
from posttrain.rollouts.environment import Stateless
from posttrain.rollouts.request import Request, Sampling
from posttrain.rollouts.torch_engine import TorchEngine
from posttrain.schema import Batch, Rollout, Sample, SamplingMask, Task
from posttrain.toy import records, tokenizer

TOKENIZER = tokenizer.build()
CUT = Sampling(
    temperature=0.8, top_p=0.7, record_kept=True, record_experts=True, record_mask=True, ignore_eos=False
)
EXACT = 1e-6
"""Mean difference of a log-prob where engine (fp32) and learner (fp64) choose alike: the engine's rounding."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint whose random model ends turns early."""
    model = tiny.model(topk=7, seed=2)
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.eos_token_id] += 0.5
    folder = tmp_path_factory.mktemp("sparse")
    checkpoint.save(model, folder, TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def rollouts(path: Path) -> list[Rollout]:
    """Rollouts of one, two and three turns, of several lengths."""

    def tool(task: Task, text: str) -> str | None:
        return "'bob'"

    requests = [
        Request(task=t, index=0, seed=i, max_new_tokens=50, max_turns=3, environment=Stateless(tool))
        for i, t in enumerate(records.tasks(seed=3, n=12))
    ]
    found = TorchEngine(checkpoint.load(path), TOKENIZER).generate(requests, CUT)
    assert len({len(r.messages) for r in found}) > 1, "all rollouts have the same number of turns"
    return found


def _learner(path: Path, **changes: Any) -> Learner:
    fields: dict[str, Any] = {
        "checkpoint": path,
        "attention": "sparse",
        "optimizer": config.Optimizer(lr=1e-3, max_grad_norm=1e9),
        "total_steps": 10,
        "train": frozenset({"model"}),
        "dtype": "float64",
    }
    return Learner(Setup(**(fields | changes)))


def _batches(
    rollouts: list[Rollout], keep: str, limit: int = 100_000, *, order: int = 1, **fields: Any
) -> list[Batch]:
    """Packed rollouts, with what `keep` names of "routing topk mask"; advantages of both signs."""
    samples = [
        Sample(
            id=f"{i:02d}",
            tokens=r.tokens,
            mask=r.sampled,
            logprobs=r.logprobs,
            advantage=1.0 if i % 2 else -0.5,
            kl_coef=0.1,
            kept=r.kept if "topk" in keep else None,
            experts=r.experts if "routing" in keep else None,
            sampling_mask=r.sampling_mask if "mask" in keep else None,
            **fields,
        )
        for i, r in enumerate(rollouts)
    ][::order]
    return packing.pack(samples, packing.token_weights(samples, "sequence", 3), tokens_per_batch=limit)


def _gaps(learner: Learner, batches: list[Batch]) -> np.ndarray[Any, Any]:
    """Differences between the engine's log-probs and the learner's."""
    found = learner.logprobs(batches, CUT.temperature)
    pairs = zip(batches, found, strict=True)
    return np.concatenate([np.abs(b.logprobs_T[b.mask_T] - logp_M) for b, logp_M in pairs])


def _gap(learner: Learner, batches: list[Batch]) -> float:
    return float(_gaps(learner, batches).mean())


def _assert_exact(learner: Learner, batches: list[Batch]) -> None:
    gaps_M = _gaps(learner, batches)
    assert gaps_M.mean() < EXACT and gaps_M.max() < 10 * EXACT


def _shake(learner: Learner, name: str, *, reference: bool = False) -> None:
    """Change the parameters of the policy, or of its reference, whose name contains this."""
    torch.manual_seed(7)
    model = learner.reference if reference else learner.model
    assert model is not None
    state = model.state_dict()
    with torch.no_grad():
        for key in (key for key in state if name in key):
            state[key] += torch.randn_like(state[key])


@pytest.mark.parametrize("limit", [60, 100_000], ids=["micro-batches", "one batch"])
def test_learner_and_engine_agree_where_everything_is_kept(
    path: Path, rollouts: list[Rollout], limit: int
) -> None:
    _assert_exact(_learner(path), _batches(rollouts, "routing topk mask", limit))


@pytest.mark.parametrize("limit", [60, 100_000], ids=["micro-batches", "one batch"])
def test_keep_routing_reproduces_the_engine_after_the_router_has_changed(
    path: Path, rollouts: list[Rollout], limit: int
) -> None:
    """Only the balancing bias moves: it chooses experts and enters no gate, so that the rest must be equal."""
    learner = _learner(path)
    _shake(learner, "e_score_correction_bias")
    assert _gap(learner, _batches(rollouts, "mask", limit)) > 1e-2
    _assert_exact(learner, _batches(rollouts, "routing mask", limit))


@pytest.mark.parametrize("limit", [60, 100_000], ids=["micro-batches", "one batch"])
def test_keep_topk_reproduces_the_engine_after_the_indexers_have_changed(
    path: Path, rollouts: list[Rollout], limit: int
) -> None:
    learner = _learner(path)
    _shake(learner, ".indexer.")
    assert _gap(learner, _batches(rollouts, "mask", limit)) > 1e-2
    _assert_exact(learner, _batches(rollouts, "topk mask", limit))


def test_both_replays_together(path: Path, rollouts: list[Rollout]) -> None:
    learner = _learner(path)
    _shake(learner, ".indexer.")
    _shake(learner, "e_score_correction_bias")
    assert _gap(learner, _batches(rollouts, "topk mask")) > 1e-2
    _assert_exact(learner, _batches(rollouts, "routing topk mask"))


def test_gates_of_replayed_experts_come_from_the_current_router(path: Path, rollouts: list[Rollout]) -> None:
    """Experts stay the engine's, though the router would choose others; its weights move the log-probs and learn."""
    learner = _learner(path)
    _shake(learner, ".gate.weight")
    batches = _batches(rollouts, "routing topk mask")
    assert _gap(learner, batches) > 1e-3
    seen = _watch(learner, ".gate.weight")
    learner.grpo_step(batches, config.Loss(clip=100.0), CUT.temperature)
    assert min(float(gradient.norm()) for gradient in seen.values()) > 0
    recorded = batches[0].experts_NTE
    assert recorded is not None
    routed_T = recorded[0, :, 0] >= 0
    assert (~routed_T).sum() == len(rollouts), "the last token of each document is routed anew"
    used, free = _experts(learner, batches[0]), _experts(learner, _batches(rollouts, "topk mask")[0])
    assert (used[:, routed_T] == recorded[:, routed_T]).all()
    assert (used[0, ~routed_T] == free[0, ~routed_T]).all(), "equal inputs in the first MoE layer"
    assert (used[0, routed_T] != free[0, routed_T]).any()


def _experts(learner: Learner, batch: Batch) -> np.ndarray[Any, Any]:
    """[N, T, E] the experts that a pass over the batch uses."""
    tensors = learner._on_device(batch)
    context = learner._context(tensors)
    with torch.no_grad():
        learner._logprobs(learner.model, tensors, context)
    found = [record.experts_TE for _, record in sorted(context.records.items())]
    return np.stack([experts.numpy() for experts in found if experts is not None])


def _watch(learner: Learner, name: str) -> dict[str, torch.Tensor]:
    """The gradients of the coming optimizer step, of parameters whose name contains this."""
    seen: dict[str, torch.Tensor] = {}
    step = learner.optimizers.step

    def watched(*, finite: bool) -> dict[str, float]:
        for key, parameter in learner.model.named_parameters():
            if name in key and parameter.grad is not None:
                seen[key] = parameter.grad.clone()
        return step(finite=finite)

    learner.optimizers.step = watched  # type: ignore[method-assign]
    return seen


def test_the_sampling_mask_makes_truncated_log_probs_those_of_the_engine(
    path: Path, rollouts: list[Rollout]
) -> None:
    learner = _learner(path)
    _assert_exact(learner, _batches(rollouts, "mask"))
    assert _gap(learner, _batches(rollouts, "")) > 0.1


def test_the_mask_is_what_top_p_left(path: Path, rollouts: list[Rollout]) -> None:
    learner = _learner(path)
    for rollout in rollouts[:3]:
        mask = rollout.sampling_mask
        assert mask is not None
        assert mask.counts.dtype == mask.ids.dtype == np.int32
        assert ((mask.counts > 0) <= rollout.sampled).all() and mask.counts.sum() == len(mask.ids)
        with torch.no_grad():
            logits = learner.model(
                torch.from_numpy(rollout.tokens.astype(np.int64)), tiny.packed([len(rollout.tokens)])
            )
        logp = sampling.processed_logprobs(logits, CUT.temperature, CUT.top_p)
        sets = np.split(mask.ids, np.cumsum(mask.counts)[:-1])
        for at in np.flatnonzero(rollout.sampled):
            assert sets[at].tolist() == (logp[at - 1] > float("-inf")).nonzero()[:, 0].tolist()
            assert rollout.tokens[at] in sets[at]


@pytest.mark.parametrize("of_reference", [False, True], ids=["policy moved", "reference moved"])
@pytest.mark.parametrize(("keep", "part"), [("routing", "e_score_correction_bias"), ("topk", ".indexer.")])
def test_the_reference_replays_the_same_choices(
    path: Path, rollouts: list[Rollout], keep: str, part: str, of_reference: bool
) -> None:
    """Policy and reference differ only in what chooses: with the choice kept there is no KL left."""
    for kept, is_zero in ((f"{keep} mask", True), ("mask", False)):
        learner = _learner(path, reference=True)
        _shake(learner, part, reference=of_reference)
        batches = _batches(rollouts[:3], kept)
        figures, _ = learner.grpo_step(batches, config.Loss(kl="k2"), CUT.temperature)
        assert (figures["kl"] < 1e-12) == is_zero


def test_kl_with_a_mask_is_over_the_kept_set(path: Path, rollouts: list[Rollout]) -> None:
    """The reference's log-probs too are renormalised over the engine's set: worked out from its full logits."""
    learner = _learner(path, reference=True)
    _shake(learner, "lm_head")
    batches = _batches(rollouts[:1], "mask")
    figures, (logp_M,) = learner.grpo_step(batches, config.Loss(kl="k1"), CUT.temperature)
    assert learner.reference is not None
    tokens = rollouts[0].tokens.astype(np.int64)
    with torch.no_grad():
        logits = learner.reference(torch.from_numpy(tokens), tiny.packed([len(tokens)])) / CUT.temperature
    mask = rollouts[0].sampling_mask
    assert mask is not None
    sets = np.split(mask.ids, np.cumsum(mask.counts)[:-1])
    wanted = [
        float(logits[at - 1, tokens[at]] - logits[at - 1, torch.from_numpy(sets[at]).long()].logsumexp(0))
        for at in np.flatnonzero(rollouts[0].sampled)
    ]
    assert figures["kl"] == pytest.approx(float(np.mean(logp_M - np.array(wanted))), abs=1e-5)


@pytest.mark.parametrize("policy", ["grpo", "gspo", "cispo"])
@pytest.mark.parametrize("kl", ["none", "k3", "unbiased"])
def test_every_loss_goes_with_every_keep_however_it_is_packed(
    path: Path, rollouts: list[Rollout], policy: Any, kl: Any
) -> None:
    """One batch, micro-batches, those in another order, logits 23 tokens at a time: gradients equal to 1e-6."""
    settings = config.Loss(policy=policy, kl=kl, offpolicy_delta=0.3, entropy_coef=0.01, clip_high=0.28)
    found = []
    for limit, order, rows in ((100_000, 1, 10**6), (150, 1, 10**6), (150, -1, 10**6), (100_000, 1, 23)):
        learner = _learner(path, reference=True, max_logits=rows * len(TOKENIZER))
        _shake(learner, "o_proj")
        seen = _watch(learner, "")
        batches = _batches(rollouts[:4], "routing topk mask", limit, order=order)
        figures, _ = learner.grpo_step(batches, settings, CUT.temperature)
        found.append((len(batches), figures["loss"], torch.cat([g.flatten() for g in seen.values()])))
    (_, loss_one, grads_one), *others = found
    assert [num > 1 for num, *_ in found] == [False, True, True, False] and grads_one.norm() > 1e-3
    for _, loss_many, grads_many in others:
        assert loss_many == pytest.approx(loss_one, rel=1e-5)
        assert (grads_many - grads_one).norm() < 1e-6 * grads_one.norm()


def test_recomputed_old_policy_of_the_first_update_is_the_policy_itself(
    path: Path, rollouts: list[Rollout]
) -> None:
    """Ratio 1: nothing is clipped, whatever the engine's log-probs; given log-probs count instead."""
    settings = config.Loss(old_policy="recomputed", clip=1e-6, correction="truncate")
    batches = _batches(rollouts, "routing topk")  # without the mask the engine's log-probs are far off
    figures, (logp_M,) = _learner(path).grpo_step(batches, settings, CUT.temperature)
    engine_M = batches[0].logprobs_T[batches[0].mask_T]
    assert np.abs(logp_M - engine_M).mean() > 0.05
    assert figures["clipped"] == 0 and figures["correction"] < 1
    moved = [packing.with_old_logprobs(batches[0], logp_M - np.float32(0.1))]
    figures, _ = _learner(path).grpo_step(moved, settings, CUT.temperature)
    assert figures["clipped"] == 1


def test_a_sequence_may_have_its_own_clip(path: Path, rollouts: list[Rollout]) -> None:
    batches = _batches(rollouts, "", clip=(1e-7, 1e-7))  # without the mask every log-prob is off
    learner = _learner(path)
    figures, _ = learner.grpo_step(batches, config.Loss(clip=1e9), CUT.temperature)
    assert figures["clipped"] > 0.99
    figures, _ = learner.grpo_step(_batches(rollouts, ""), config.Loss(clip=1e9), CUT.temperature)
    assert figures["clipped"] == 0


def test_a_training_indexer_learns_from_the_kept_set(path: Path, rollouts: list[Rollout]) -> None:
    learner = _learner(path, train=frozenset({"model", "indexer"}), indexer_loss="sparse")
    _shake(learner, ".indexer.")
    seen = _watch(learner, ".indexer.")
    batches = _batches(rollouts[:4], "topk mask")
    _assert_exact(learner, batches)
    figures, _ = learner.grpo_step(batches, config.Loss(), CUT.temperature)
    assert figures["indexer_kl"] > 0
    assert len(seen) == len(learner.model.indexer_parameters())
    assert sum(float(gradient.norm()) for gradient in seen.values()) > 0


def test_kept_log_probs_by_hand() -> None:
    """Logits log 1, 2, 3, 4: the target 3 of {2, 3}: 3/5; the target 4 of all: 4/10; of {1, 4}: 4/5."""
    logits = torch.tensor([[1.0, 2, 3, 4]] * 3).log().requires_grad_()
    kept = logprob.KeptIds(torch.tensor([0, 2]), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 0, 3]))
    targets = torch.tensor([2, 3, 3])
    found = logprob.sampled_logprobs(logits, targets, 1.0, kept)
    assert found.exp().tolist() == pytest.approx([0.6, 0.4, 0.8])
    found[0].backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0, -0.4, 0.4, 0]), "one-hot minus softmax over the set"
    hot = logprob.sampled_logprobs(logits, targets, 0.5, kept).exp()
    assert hot.tolist() == pytest.approx([9 / 13, 16 / 30, 16 / 17])


@pytest.mark.parametrize("rows", [1, 7, 12, 63, 64])
def test_logits_of_a_few_tokens_at_a_time_are_the_plain_form(rows: int) -> None:
    """63 tokens of which some have a kept set, in fp64: values, entropies and gradients, whatever the cut."""
    rng = torch.Generator().manual_seed(0)
    x, head = (torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (63, 29))
    targets = torch.randint(29, (63,), generator=rng)
    masked = torch.tensor([0, 6, 7, 30, 31, 62])
    sets = [
        torch.cat((targets[m, None], (targets[m, None] + 1 + torch.arange(i)) % 29))
        for i, m in enumerate(masked)
    ]
    owner = torch.repeat_interleave(torch.arange(6), torch.tensor([len(ids) for ids in sets]))
    kept = logprob.KeptIds(masked, owner, torch.cat(sets))
    weight = torch.randn(63, generator=rng, dtype=torch.float64)

    def found(read: Any) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, head)]
        logp, entropy = read(*leaves)[:2]
        (weight * (logp + 0.3 * entropy)).sum().backward()
        return [logp.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]

    def plain(x: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = x @ head.t()
        return logprob.sampled_logprobs(logits, targets, 0.7, kept), logprob.entropy(logits, 0.7)

    def by_rows(x: torch.Tensor, head: torch.Tensor) -> Any:
        hidden = logprob.Hidden(x, head)
        return logprob.head_logprobs(hidden, targets, 0.7, kept, with_entropy=True, max_logits=29 * rows + 3)

    for ours, expected in zip(found(by_rows), found(plain), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-13, rtol=1e-12)


def test_all_logits_never_exist_together() -> None:
    """No array that any operation makes, forward or backward, is larger than the limit."""
    x, head = torch.randn(50, 4, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    targets = torch.arange(50) % 40

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            made = [
                t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)
            ]
            self.numel = max(self.numel, *made, 0)
            return out

    for limit, largest in ((40 * 9, 40 * 9), (40 * 50, 40 * 50)):
        with Largest() as seen:
            logp, entropy, _ = logprob.head_logprobs(
                logprob.Hidden(x, head), targets, 1.0, None, with_entropy=True, max_logits=limit
            )
            assert entropy is not None
            (logp + entropy).sum().backward()
        assert seen.numel == largest


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, -1e9, 0.0], [5.0, -1e9, -1e9, -1e9]])
    assert logprob.entropy(logits, 1.0).tolist() == pytest.approx([np.log(3), 0.0])


def test_packing_puts_the_recordings_of_documents_side_by_side() -> None:
    """Two documents of 3 and 2 tokens, top-k 2, one MoE layer of two experts, one sampled token each."""
    kept = np.array([[[0, -1], [0, 1]]], np.int16)
    first = tiny.sample(
        "a",
        3,
        kept=kept,
        experts=np.array([[[1, 2], [0, 3]]], np.int16),
        sampling_mask=SamplingMask(  # the set of a token that is no target is left out
            counts=np.array([1, 2, 1], np.int32), ids=np.array([3, 4, 9, 7], np.int32)
        ),
    )
    second = tiny.sample(
        "b", 2, kept=kept[:, :1, :1], experts=np.array([[[2, 0]]], np.int16), sampling_mask=None
    )
    assert first.mask.tolist() == [False, True, True] and second.mask.tolist() == [False, True]
    (batch,) = packing.pack([first, second], [1, 1], tokens_per_batch=100)
    assert batch.ids == ("b", "a")
    assert batch.kept_NTK is not None and batch.experts_NTE is not None
    assert batch.kept_NTK.dtype == batch.experts_NTE.dtype == np.int16
    assert batch.kept_NTK[0].tolist() == [[0, -1], [1, -1], [0, -1], [0, 1], [2, -1]]
    assert batch.experts_NTE[0].tolist() == [[2, 0], [-1, -1], [1, 2], [0, 3], [-1, -1]]
    assert batch.sampling_mask is not None
    assert batch.sampling_mask.counts.tolist() == [0, 0, 0, 2, 1]
    assert batch.sampling_mask.ids.tolist() == [4, 9, 7]


def test_top_k_cuts_and_is_recorded() -> None:
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]]).log()
    logp = sampling.processed_logprobs(logits, 1.0, 1.0, top_k=2)
    assert logp.exp().flatten().tolist() == pytest.approx([0.625, 0, 0.375, 0, 0.5, 0.5, 0, 0])
    counts, ids = sampling.kept_tokens(logp)
    assert counts.tolist() == [2, 2] and ids.tolist() == [0, 2, 0, 1]
    counts, ids = sampling.kept_tokens(sampling.processed_logprobs(logits, 1.0, 0.99, top_k=0))
    assert counts.tolist() == [0, 0] and ids.tolist() == [], "all are left: nothing is recorded"
