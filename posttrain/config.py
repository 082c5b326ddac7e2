"""Every knob of the system: one pydantic module, frozen, unknown keys are errors. Imports no torch.

A recipe is a TOML file; several files merge left to right, then `--set a.b=c`. The order of [[stages]]
is the order of execution. Next: schema.py for the nouns, pipeline.py for how stages run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from posttrain import graph, overrides, stage_uri

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Model(BaseModel):
    """Base of every section: frozen, no unknown keys, field docs from the strings below the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Reward(Model):
    """One reward function."""

    fn: str
    """Import path `package.module:function`."""
    name: str = ""
    """What its part of the score is called; empty: the function's name."""
    weight: float = 1.0
    """Factor in the sum of rewards."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds it may take for one rollout (a group, if it judges groups); then it is killed, and the rollout
    scores 0 if the reward can judge the reference answer."""
    args: dict[str, Any] = {}
    """If given, the target is called with these keywords and returns the reward function. A text "stage://NAME"
    anywhere in it becomes the folder of that stage of the run: a judge that the recipe trains itself."""

    @property
    def stages(self) -> list[str]:
        """Stages whose checkpoints it asks."""
        return stage_uri.stages(self.args)

    def resolved(self, run: Path) -> "Reward":
        """The same with the folders of the run's stages."""
        return self.model_copy(update={"args": stage_uri.resolved(self.args, run)})


class Domain(Model):
    """One task family: where its tasks come from and how an answer is judged."""

    name: Name
    tasks: str
    """Path of a .jsonl or .parquet file, or rg://, hf:// or py:// URI."""
    where: str | None = None
    """Import path of a predicate on Task; tasks for which it is false are dropped."""
    num_eval: int = Field(200, ge=1)
    """Tasks held out for evaluation, chosen by prompt hash."""
    rewards: list[Reward] = Field(min_length=1)
    """What training maximises: the weighted sum."""
    passes: list[Reward] = []
    """What pass@1 and the distillation filter mean: all must give 1. Empty: the rewards themselves."""
    tool: str | None = None
    """Import path of a tool, `fn(task, assistant text) -> result text, or None if the turn is no call`."""
    environment: str | None = None
    """Import path of `start(task, seed) -> Episode` (rollouts/environment.py), where calls leave a state behind."""
    max_turns: int = Field(1, ge=1)
    """Assistant turns at most; more than one needs a tool or an environment."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens after the prompt at most, tool results included."""
    demonstrate: str | None = None
    """Import path of `fn(task, random.Random) -> messages`: demonstrations for pretraining."""

    @property
    def stages(self) -> list[str]:
        """Stages whose checkpoints its rewards ask."""
        every = [name for reward in [*self.rewards, *self.passes] for name in reward.stages]
        return list(dict.fromkeys(every))

    @model_validator(mode="after")
    def _tool_for_turns(self) -> Self:
        if self.tool is not None and self.environment is not None:
            raise ValueError("both tool and environment are set; a domain has one of them")
        if self.max_turns > 1 and self.tool is None and self.environment is None:
            raise ValueError(
                f"max_turns={self.max_turns} without a tool; set tool, environment or max_turns = 1"
            )
        return self


class Optimizer(Model):
    """Muon on hidden matrices and AdamW on the rest, or AdamW on everything."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    """Peak learning rate."""
    indexer_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the indexers, where they train (always AdamW)."""
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = Field(0, ge=0)
    decay_from: float = Field(1.0, ge=0, le=1)
    """Share of the steps after which the rate falls linearly to zero; 1 = constant."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm is clipped here, separately for model and indexers."""
    spike_factor: float | None = Field(None, gt=1)
    """Skip a step whose gradient norm, of model or indexers, is more than this times the median of the last
    spike_window steps; None = off. Steps that are not finite are always skipped."""
    spike_window: int = Field(64, ge=8)
    """Steps that the median is taken over; the guard begins after 8."""


class Arch(Model):
    """Shape of a model made from scratch; the names are those of the Hugging Face config."""

    hidden_size: int = Field(96, ge=1)
    num_hidden_layers: int = Field(3, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    q_lora_rank: int = Field(64, ge=1)
    kv_lora_rank: int = Field(48, ge=1)
    qk_nope_head_dim: int = Field(16, ge=1)
    qk_rope_head_dim: int = Field(16, ge=2)
    v_head_dim: int = Field(24, ge=1)
    intermediate_size: int = Field(256, ge=1)
    moe_intermediate_size: int = Field(64, ge=1)
    n_routed_experts: int = Field(8, ge=1)
    num_experts_per_tok: int = Field(2, ge=1)
    n_shared_experts: int = Field(1, ge=1)
    first_k_dense_replace: int = Field(1, ge=0)
    """Leading layers without experts."""
    routed_scaling_factor: float = 1.0
    initializer_range: float = Field(0.1, gt=0)
    max_position_embeddings: int = Field(512, ge=1)


class TextData(Model):
    """Where language-model training reads from: text and chats, or demonstrations of the domains."""

    text: list[str] = []
    """Paths (.jsonl, .parquet), hf:// or py:// URIs of rows with a text column."""
    column: str = "text"
    chats: list[str] = []
    """The same of rows with a messages column. Text and chats empty: demonstrations."""
    seq_len: int = Field(4096, ge=2)
    """Text is cut into documents of at most this many tokens."""
    sequences_per_step: int = Field(48, ge=1)
    loss_on: Literal["all", "assistant"] = "all"
    """Which tokens count in the LM loss; "assistant" takes text whole."""

    @property
    def files(self) -> list[str]:
        """Everything it reads; empty: demonstrations."""
        return [*self.text, *self.chats]


class _Stage(Model):
    name: Name
    evaluate: bool = True
    """Measure pass@1 of the resulting checkpoint on every domain's held-out tasks."""


class Pretrain(_Stage):
    """A small dense MLA model learns the task formats (only where no checkpoint exists)."""

    kind: Literal["pretrain"]
    steps: int = Field(ge=1)
    arch: Arch = Arch()
    tokenizer: str
    """Import path of a function that builds the tokenizer."""
    data: TextData = TextData()
    optimizer: Optimizer
    balance_speed: float = Field(1e-3, ge=0)
    """Step of the expert-bias update (DeepSeek-V3 2.1.2: 0.001); larger evens the load sooner."""


class Convert(_Stage):
    """Dense MLA checkpoint -> the same weights plus fresh indexers."""

    kind: Literal["convert"]
    source: str
    """Stage name, or path of a Hugging Face checkpoint."""
    index_topk: int = Field(2048, ge=1)
    """Entries each query keeps (V3.2-Exp 2.1: 2048)."""
    index_n_heads: int = Field(64, ge=1)
    index_head_dim: int = Field(128, ge=2)
    index_hadamard: bool = False
    """Rotate indexer queries and keys (a precision aid under e4m3; exact in bf16)."""
    index_dtype: Literal["model", "e4m3"] = "model"
    """What index scores are made from: the model's type, or e4m3 with a scale per key and head, as V3.2 does: faster on a GPU,
    with smaller caches. Written into the checkpoint, which binds learner and engines."""
    evaluate: bool = False


class Warmup(_Stage):
    """Dense attention, only the indexers train: KL over all causal keys (V3.2-Exp Eq. 3)."""

    kind: Literal["warmup"]
    source: str
    steps: int = Field(ge=1)
    data: TextData = TextData()
    optimizer: Optimizer
    heldout_tokens: int = Field(50_000, ge=1)
    """Held-out targets, predicted from more than top-k keys, that the stage's figures are measured on."""
    evaluate: bool = False


class Sparse(_Stage):
    """Top-k on, everything trains; the indexer on its KL over the selected set (V3.2-Exp Eq. 4)."""

    kind: Literal["sparse"]
    source: str
    steps: int = Field(ge=1)
    data: TextData = TextData()
    optimizer: Optimizer
    balance_speed: float = Field(1e-3, ge=0)
    heldout_tokens: int = Field(50_000, ge=1)
    attention: Literal["sparse", "dense"] = "sparse"
    """"dense" trains the same number of steps without top-k: the control of the sparse stage."""


class Mix(Model):
    """A domain's part in an RL stage."""

    weight: float = Field(1.0, gt=0)
    """Share of the tasks of a step, relative to the other domains."""
    specialist: str | None = None
    """Stage that trained the domain's specialist: the teacher, with mopd. If the stage is evaluated, its pass@1 less
    the pass rate in this stage's rollouts is logged as gap/<domain>: sampled alike, the specialist on held-out tasks
    with the domain's length budget, the policy on the tasks that it trains on with its own."""
    curriculum: float = Field(0.0, ge=0, le=0.75)
    """Chance with which a task is passed over whose group cannot have a signal (pass rate 0 or 1 as measured so far);
    less the likelier a signal is. 0 = off. One let through all the same stands for 1 / (1 - curriculum) in the measured
    rates: above 0.75 a few groups would decide them. Neither V3.2 nor V4 publishes a curriculum."""
    level: str | None = None
    """Import path of `fn(task) -> level of difficulty`; tasks of a level share what the curriculum has measured. None:
    a task that was not seen yet is taken for one of its domain."""
    loss_weight: float = Field(1.0, gt=0)
    """Factor on the domain's loss."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL to the stage's starting policy (V3.2 3.1: domains differ, mathematics may use 0)."""
    clip: float | None = Field(None, gt=0)
    """The domain's own loss.clip."""
    clip_high: float | None = Field(None, gt=0)
    """The domain's own loss.clip_high; with `clip` alone, the domain's clip is symmetric."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Length budget in this stage; None = the domain's."""
    overlong_buffer: int = Field(0, ge=0)
    """The reward falls in a straight line by 1 over the last so many tokens of the budget (DAPO Eq. 13: 4096 of
    20480); 0 = off. Changes the advantage, never the score that is reported."""

    @model_validator(mode="after")
    def _level_is_read(self) -> Self:
        if self.level is not None and not self.curriculum:
            raise ValueError(
                "level without a curriculum, which alone reads it; set curriculum or leave level out"
            )
        return self


class Loss(Model):
    """The policy loss: V3.2's form of GRPO (Eq. 5 to 9) unless told otherwise; loss.py has the equations.

    Dr.GRPO (arXiv 2503.20783, 3.2) is norm = "constant". DAPO (arXiv 2503.14476) is clip_high = 0.28,
    norm = "token", divide_by_std = true, with the stage's refill_rounds and the mix's overlong_buffer.
    """

    policy: Literal["grpo", "gspo", "cispo"] = "grpo"
    """"grpo" clips a ratio per token (V3.2 Eq. 5), "gspo" one per sequence (GSPO, arXiv 2507.18071, Eq. 5 and 7);
    "cispo" makes the cut ratio a constant weight of the log-prob (MiniMax-M1, arXiv 2506.13585, Eq. 4)."""
    old_policy: Literal["engine", "recomputed"] = "engine"
    """Under what the ratio's pi_old is: the engine's log-probs, so that its rounding counts as staleness, or the
    learner's own, made anew before the first update."""
    clip: float = Field(0.2, gt=0)
    """Epsilon of the ratio clip, below 1 and, without clip_high, above; larger trusts stale samples more."""
    clip_high: float | None = Field(None, gt=0)
    """Epsilon above 1 (DAPO 3.1: 0.28), the only one of "cispo"; None = clip, the symmetric clip of V3.2 Eq. 5."""
    kl: Literal["none", "k1", "k2", "k3", "unbiased"] = "unbiased"
    """KL estimator, times the domain's kl_coef. "unbiased" is V3.2 Eq. 7; "k3" the original GRPO's; "k1" has a zero
    expected gradient; "none" ignores kl_coef and keeps no reference model."""
    offpolicy_delta: float | None = Field(None, gt=0)
    """Off-policy sequence mask (V3.2 Eq. 9): threshold on mean log(pi_engine / pi); None = off."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Corrects the policy term for drawing tokens from the engine (other kernels, other rounding) by the weight
    w = pi_old / pi_engine: "truncate" min(w, C) (TIS), "mask" w inside [1 / C, C] and 0 outside (MIS)."""
    correction_cap: float = Field(2.0, ge=1)
    """C of the correction; larger corrects more and is noisier. V3.2 has no such correction."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus; larger keeps the policy broader. V3.2 has none."""
    norm: Literal["sequence", "token", "constant"] = "sequence"
    """"sequence": the paper's 1/G and 1/|o|; "token": one sum over all valid tokens of the step (DAPO Eq. 12);
    "constant": 1/G and 1 / length budget (Dr.GRPO), so that long answers count by their length."""
    divide_by_std: bool = False
    """Divide advantages by the group's standard deviation (DeepSeekMath 4.1.2); V3.2 and Dr.GRPO do not."""

    @model_validator(mode="after")
    def _correction_has_an_old_policy(self) -> Self:
        if self.correction != "none" and self.old_policy == "engine":
            raise ValueError(
                f'correction="{self.correction}" with old_policy="engine": the ratio already is against the '
                'engine; set old_policy = "recomputed" or correction = "none"'
            )
        return self


class Keep(Model):
    """What the learner takes over from the engine instead of choosing anew; for policy, old policy and reference."""

    routing: bool = False
    """Keep Routing (V3.2 3.1): the engine's experts, gates from the current weights. 2 bytes per token, MoE layer
    and chosen expert."""
    sampling_mask: bool = True
    """Keep Sampling Mask (V3.2 3.1): log-probs over the tokens that top-p or top-k left. 4 bytes per token left;
    costs nothing where nothing is cut."""
    topk: bool = False
    """Keep Top-k: the cache entries that the engine's indexers chose. 2 or 4 bytes per token, layer and entry:
    about 500 kB per token at 61 layers of 2048 (GLM-5 3.2 finds that impractical and relies on equal kernels)."""


class Lora(Model):
    """Train low-rank adapters of attention and dense MLPs (peft) instead of all weights; merged in fp32 for rollouts
    and for the stage's checkpoint. The reference of the KL is the model with its adapters off."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    """Adapters count alpha / rank times; larger learns faster at the same rate."""


class Mopd(Model):
    """Multi-teacher on-policy distillation (V4, arXiv 2606.19348): on its own rollouts the policy is pulled towards the
    specialist of each rollout's domain, by reverse KL. The domain's loss_weight is the teacher's weight."""

    form: Literal["full", "sampled"] = "full"
    """"full": the KL over the whole vocabulary at every token (V4's); "sampled": log(pi_teacher / pi) of the sampled
    token as its advantage, the same gradient in expectation, with more noise and one set of logits less."""
    coef: float = Field(1.0, gt=0)
    """Weight of the KL; only its size beside rewards and kl_coef matters, since Adam does not see scales."""
    rewards: bool = False
    """Keep the group's advantages beside the teachers; a domain without a specialist then has rewards alone. False: the
    teachers replace them, and rewards are only reported."""


class Rollouts(Model):
    """How completions are generated."""

    engine: Literal["torch", "vllm", "fake"] = "torch"
    """"vllm" runs the same model inside vLLM, with its scheduling and paged cache; an extra (docs/vllm.md)."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens whose mass reaches this; smaller is narrower."""
    top_k: int = Field(0, ge=0)
    """Sample from at most so many tokens; 0 = no limit. Bounds the memory of keep.sampling_mask."""
    max_rows: int = Field(256, ge=1)
    """Sequences decoded at the same time by one actor."""
    cache_mib: int = Field(256, ge=1)
    """Memory of a vLLM engine's cache; sequences that do not fit wait, or are computed again."""
    batched_tokens: int = Field(2048, ge=16)
    """New tokens of one pass of vLLM; a longer prompt is computed in chunks. More are faster and need memory."""
    attention: Literal["ours", "stock"] = "ours"
    """What selects and attends in vLLM: "ours" is the learner's code, "stock" vLLM's own, which runs one geometry in
    bf16 on some GPUs and records nothing. Dense checkpoints are always served by ours."""
    tensor_parallel: int = Field(1, ge=1)
    """Devices of one engine. More than one is refused, with what a device must hold."""
    sync: Literal["auto", "memory", "ipc", "broadcast", "disk"] = "auto"
    """How weights reach the engines (docs/vllm.md); "auto" is memory on the CPU, ipc on a shared GPU, else broadcast."""
    sleep: bool = False
    """Engines give up weights and cache while the learner trains, where both are on one device."""
    device_gib: float = Field(0, ge=0)
    """Memory of an engine's device, for check where there is no such device; 0 = what this machine has."""

    @property
    def plain(self) -> bool:
        """Whether completions are the policy's own: at temperature 1, nothing cut, as an evaluation samples."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0


class Rl(_Stage):
    """GRPO. One domain makes a specialist, several the mixed stage."""

    kind: Literal["rl"]
    source: str
    mix: dict[Name, Mix] = Field(min_length=1)
    steps: int = Field(ge=1)
    tasks_per_step: int = Field(32, ge=1)
    group_size: int = Field(8, ge=2)
    """Completions per task (G); GRPO needs at least 2."""
    updates_per_step: int = Field(1, ge=1)
    """Optimizer steps per batch of rollouts; more than 1 is off-policy."""
    optimizer: Optimizer
    lora: Lora | None = None
    """None: all weights train."""
    loss: Loss = Loss()
    keep: Keep = Keep()
    mopd: Mopd | None = None
    """Learn from the specialists of the mix instead of, or beside, the rewards. None: rewards alone (V3.2)."""
    follow_gap: float = Field(0.0, ge=0)
    """Domains behind their specialist get more tasks: the weight counts exp(follow_gap * gap) times, with the gap of
    pass rates; 2 gives 20 points behind 1.5 times as many. 0 = off."""
    refill_rounds: int = Field(0, ge=0)
    """Rounds in which groups of equal rewards are replaced by groups of fresh tasks of the same domain (DAPO 3.2,
    dynamic sampling); more make steps fuller and longer; 0 = off."""
    indexer: Literal["freeze", "train"] = "freeze"
    """"train": the indexer follows its KL over the selected set during RL (GLM-5 3.2 freezes it)."""
    balance_speed: float = Field(0.0, ge=0)
    min_signal: float = Field(0.05, ge=0, le=1)
    """Warn when fewer than this share of the groups has two different rewards."""
    max_unscorable: float = Field(0.5, ge=0, le=1)
    """Fail when more than this share of a step's completions cannot be scored: a reward is broken."""


class Distill(_Stage):
    """Sample from specialists, verify, deduplicate, balance, write a dataset with provenance."""

    kind: Literal["distill"]
    specialists: dict[Name, str] = Field(min_length=1)
    """Domain -> stage whose checkpoint writes its data."""
    tasks_per_domain: int = Field(300, ge=1)
    samples_per_task: int = Field(2, ge=1)
    keep_per_domain: int = Field(600, ge=1)
    """Verified rows kept per domain at most; every domain gets the same number if it can."""
    evaluate: Literal[False] = False


class Sft(_Stage):
    """Supervised fine-tuning of a fresh copy of a sparse checkpoint."""

    kind: Literal["sft"]
    source: str
    data: list[str] = Field(min_length=1)
    """Distill stage names, or chat files (.jsonl, .parquet) with a messages column."""
    steps: int = Field(ge=1)
    sequences_per_step: int = Field(48, ge=1)
    optimizer: Optimizer
    lora: Lora | None = None
    """None: all weights train."""


class Export(_Stage):
    """A plain Hugging Face folder, reloaded in transformers to prove it."""

    kind: Literal["export"]
    source: str
    evaluate: Literal[False] = False


Stage = Annotated[
    Pretrain | Convert | Warmup | Sparse | Rl | Distill | Sft | Export, Field(discriminator="kind")
]


class Sharding(Model):
    """How the learner is spread over processes, one per GPU; parameters, gradients and moments are cut (FSDP2)."""

    ranks: int = Field(1, ge=1)
    """Learner processes. 1 trains without any wrapper, unless it offloads."""
    context: int = Field(1, ge=1)
    """Ranks that share each batch, a part of its tokens each; more for sequences too long for one."""
    reshard: bool = True
    """Give a layer's whole weights up after its forward pass and collect them again backward; false is faster and
    keeps the whole model on every rank during a step."""
    mixed_precision: bool = False
    """Parameters, sums of gradients and moments in fp32, products in cluster.dtype. Twice the memory for weights."""
    spread_experts: bool = False
    """Each rank keeps a share of the routed experts whole and tokens travel to them, instead of collecting all experts
    of a layer on every rank; pays where they are most of the model."""
    offload: bool = False
    """Parameters, gradients and moments wait in host memory, where the optimizer runs; slow, for models that do not fit
    otherwise. Needs a GPU; works with one rank too."""
    recompute: bool = False
    """Keep only the input of each layer and compute the rest again backward: far less memory, a third more work."""

    @property
    def wrapped(self) -> bool:
        """Whether FSDP holds the parameters."""
        return self.ranks > 1 or self.offload

    @model_validator(mode="after")
    def _only_for_several(self) -> Self:
        for name in ("mixed_precision", "spread_experts"):
            if self.ranks == 1 and getattr(self, name):
                raise ValueError(
                    f"{name} = true with ranks = 1: one process has no shards; set ranks = 2 or more"
                )
        if self.ranks % self.context:
            raise ValueError(f"context = {self.context} does not divide ranks = {self.ranks}")
        return self


class Cluster(Model):
    """Where the work runs."""

    ray_address: str | None = None
    """Address of a running Ray cluster; None starts one on this machine."""
    rollout_actors: int = Field(1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a GPU if torch sees one."""
    sharding: Sharding = Sharding()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter type of learner and engines."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Kernels of the sparse attention in learner and engines; "auto" is Triton's for bf16 on a GPU that fits them."""
    deterministic: bool = False
    """A step's gradients, and in vLLM a request in any batch, are the same bits every time; on a GPU this costs speed."""
    threads: int = Field(0, ge=0)
    """torch threads per actor; 0 = as many as there are idle cores when the run starts."""
    reward_workers: int = Field(0, ge=0)
    """Processes that rewards run in; 0 = one per core, at most 8. More help where rewards wait for a judge."""
    step_timeout_s: float = Field(1800, gt=0)
    """Longest wait for any one answer of an actor."""
    max_actor_restarts: int = Field(3, ge=0)
    """Dead rollout actors replaced per stage before the run fails."""

    @model_validator(mode="after")
    def _offload_from_a_gpu(self) -> Self:
        if self.sharding.offload and self.device == "cpu":
            raise ValueError(
                'sharding.offload = true with device = "cpu": parameters are in host memory as it is; set it to false'
            )
        return self


class Evaluation(Model):
    """How checkpoints are compared: the same held-out tasks and seeds for every one."""

    samples_per_task: int = Field(1, ge=1)
    greedy: bool = True
    """Also report greedy decoding."""


class Learner(Model):
    """The training actor."""

    tokens_per_microbatch: int = Field(4096, ge=1)
    """Tokens of one forward and backward pass; memory grows with it."""


class Snapshots(Model):
    """What a killed training stage goes on from, to the bit: weights, optimizer, random numbers, data."""

    every_s: float = Field(600, gt=0)
    """Take one when so many seconds have passed since the last; fewer lose less work and cost more writing."""
    every_steps: int = Field(0, ge=0)
    """Also take one after every so many steps of the stage; 0 = by the clock alone."""
    keep: int = Field(2, ge=1)
    """Snapshots kept of a stage; the one before the last serves where the last is damaged. None outlives its stage."""
    asynchronous: bool = False
    """Write while training goes on, from a copy in host memory. Until it is written, the one before counts."""


class Run(Model):
    """A whole recipe."""

    name: Name
    out: Path = Path("runs")
    """The run's folder is out/name."""
    seed: int = 0
    note: str = ""
    """What a reader of the report must know."""
    cluster: Cluster = Cluster()
    learner: Learner = Learner()
    snapshots: Snapshots = Snapshots()
    rollouts: Rollouts = Rollouts()
    evaluation: Evaluation = Evaluation()
    domains: list[Domain] = []
    stages: list[Stage] = Field(min_length=1)

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.out / self.name

    def domain(self, name: str) -> Domain:
        """The domain of that name (names are checked when the config is read)."""
        return next(d for d in self.domains if d.name == name)

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        graph.check(self)
        return self


def load(files: Sequence[str | Path], settings: Sequence[str] = ()) -> Run:
    """Read and merge TOML files, apply `a.b=c` overrides, validate.

    Raises ValueError with one line per problem: where, what is wrong, what is allowed.
    """
    data = overrides.read(files, settings)
    try:
        return Run.model_validate(data)
    except ValidationError as error:
        raise ValueError("\n".join(overrides.line(data, e) for e in error.errors())) from None
