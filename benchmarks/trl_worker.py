"""One process of TRL's GRPOTrainer with a clock; runs in the environment that vs_trl.py made.

Everything is a documented option of TRL. The two methods overridden only take the time (their names
are those of TRL 1.16). Next: ours_worker.py.
"""

import tempfile
import time
from typing import Any

import torch
import transformers
import trl
import worker
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Times whole steps, without data loading and logging."""

    def __init__(self) -> None:
        self.steps: list[worker.Step] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(worker.Step())
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
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
    clock = Clock()
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
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}, "not fp32"
        trainer.train()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    worker.write_result(spec, clock.steps, worker.peak_bytes(), versions)


def _config(spec: worker.Spec, out: str) -> trl.GRPOConfig:
    return trl.GRPOConfig(
        output_dir=out,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        # Saves memory for time, which a model of this size does not need.
        gradient_checkpointing=False,
        per_device_train_batch_size=spec.completions,
        num_generations=spec.group_size,
        max_steps=spec.total_steps,
        max_completion_length=spec.new_tokens,
        generation_kwargs=None if spec.stop_at_eos else {"min_new_tokens": spec.new_tokens},
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
    )


def _reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    return [worker.reward(turns[0]["content"]) for turns in completions]


if __name__ == "__main__":
    main()
