"""One process of TRL's GRPOTrainer with a clock; runs in the environment that vs_trl.py made.

Everything is a documented option of TRL; with rollouts "vllm, names mended" its hand-over of weights is mended as well,
because vLLM's DeepSeek-V3.2 knows experts one by one and TRL hands over all of a layer. The other methods overridden only
take the time (their names are those of TRL 1.16). Next: ours_worker.py.
"""

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
import trl
import worker
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Times whole steps, without data loading and logging."""

    def __init__(self, spec: worker.Spec) -> None:
        self.spec = spec
        self.steps: list[worker.Step] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(worker.Step())
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        worker.synchronize(self.spec)
        self.steps[-1].total = time.perf_counter() - self._began
        self.steps[-1].cpu = time.process_time() - self._cpu


class TimedTrainer(trl.GRPOTrainer):
    """GRPOTrainer that notes how long generation and scoring take."""

    clock: Clock
    spec: worker.Spec

    def _generate(self, prompts: list[Any]) -> Any:
        began = time.perf_counter()
        out = super()._generate(prompts)
        step = self.clock.steps[-1]
        step.generate = time.perf_counter() - began
        prompt_ids, completion_ids = out[0], out[1]
        step.prompts = worker.prompts_hash([list(map(int, ids)) for ids in prompt_ids])
        step.lengths = [len(ids) for ids in completion_ids]
        worker.check(self.spec, step.lengths)
        return out

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        began = time.perf_counter()
        out = super()._generate_and_score_completions(inputs)
        step = self.clock.steps[-1]
        step.score = time.perf_counter() - began - step.generate
        return out


def main() -> None:
    """Train for the steps of the specification."""
    spec = worker.read_spec()
    torch.set_num_threads(spec.threads)
    clock = Clock(spec)
    with tempfile.TemporaryDirectory() as out:
        trainer = TimedTrainer(
            model=spec.checkpoint,
            processing_class=AutoTokenizer.from_pretrained(spec.checkpoint),
            reward_funcs=_reward,
            args=_config(spec, out),
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": question}]} for question in spec.prompts]
            ),
            callbacks=[clock],
        )
        trainer.clock, trainer.spec = clock, spec
        # Some weights of this model stay in fp32, whatever is asked for.
        found = {p.dtype for p in trainer.model.parameters()} - {torch.float32}
        assert found <= {getattr(torch, spec.dtype)}, f"{found}, not {spec.dtype}"
        if spec.rollouts == NAMES_MENDED:
            given = trainer.vllm_generation
            named = given._iter_named_params
            given._iter_named_params = lambda: _split_experts(named())
        trainer.train()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    allocated = worker.allocated_bytes(spec)
    worker.write_result(spec, clock.steps, worker.peak_bytes(), versions, allocated_bytes=allocated)


def _config(spec: worker.Spec, out: str) -> trl.GRPOConfig:
    on_gpu = spec.device == "cuda"
    passes, rest = divmod(spec.completions, spec.micro_batch)
    assert not rest, f"{spec.completions} completions in micro-batches of {spec.micro_batch}"
    return trl.GRPOConfig(
        output_dir=out,
        use_cpu=not on_gpu,
        model_init_kwargs={"dtype": spec.dtype},
        bf16=on_gpu,  # products alone, by autocast: the default
        gradient_checkpointing=spec.recompute,
        per_device_train_batch_size=spec.micro_batch,
        gradient_accumulation_steps=passes,
        num_generations=spec.group_size,
        max_steps=spec.total_steps,
        max_completion_length=spec.new_tokens,
        temperature=1.0,
        shuffle_dataset=False,
        beta=0.0,
        epsilon=spec.clip,
        loss_type="grpo",
        scale_rewards="none",
        learning_rate=spec.lr,
        lr_scheduler_type="constant",
        adam_beta1=spec.betas[0],
        adam_beta2=spec.betas[1],
        weight_decay=0.0,
        seed=spec.seed,
        logging_steps=spec.total_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **_rollouts(spec),
    )


NAMES_MENDED = "vllm, names mended"


def _rollouts(spec: worker.Spec) -> dict[str, Any]:
    """TRL's settings of one way to generate."""
    if spec.rollouts == "generate":
        return {"generation_kwargs": None if spec.stop_at_eos else {"min_new_tokens": spec.new_tokens}}
    if spec.rollouts == "continuous batching":
        never = None if spec.stop_at_eos else {"eos_token_id": -1}
        return {"use_transformers_continuous_batching": True, "generation_kwargs": never}
    settings: dict[str, Any] = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_model_impl": "transformers" if spec.rollouts == "vllm, model of transformers" else "vllm",
        "generation_kwargs": None if spec.stop_at_eos else {"ignore_eos": True},
    }
    assert spec.rollouts in ("vllm", NAMES_MENDED, "vllm, model of transformers"), spec.rollouts
    return settings


def _split_experts(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts one by one, as a checkpoint has them."""
    for name, tensor in tensors:
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".mlp.experts"):
            yield name, tensor
        elif last == "gate_up_proj":
            for i, both in enumerate(tensor):
                gate, up = both.chunk(2)
                yield f"{stem}.{i}.gate_proj.weight", gate
                yield f"{stem}.{i}.up_proj.weight", up
        else:
            for i, matrix in enumerate(tensor):
                yield f"{stem}.{i}.{last}.weight", matrix


def _reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    return [worker.reward(turns[0]["content"]) for turns in completions]


if __name__ == "__main__":
    main()
