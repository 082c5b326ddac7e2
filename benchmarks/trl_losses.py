"""What TRL's GRPOTrainer makes of fixed log-probs: losses and gradients, for tests/test_trl_losses.py to compare ours with.

`.bench/trl/bin/python benchmarks/trl_losses.py`, in the environment that vs_trl.py makes; writes tests/trl_losses.json.
Everything is in fp64. A trainer is made from each case's options, as a user would, and its own loss is called; only the
model's log-probs and entropies are given. Made with TRL 1.16.0 and torch 2.13.0; of another version look at the changes.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

# kernels.py of this folder would be found in place of Hugging Face's package, which transformers looks for.
sys.path.remove(str(Path(__file__).parent))

import numpy as np
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FILE = Path(__file__).resolve().parents[1] / "tests" / "trl_losses.json"
LENGTHS = [7, 3, 5, 1, 6]
BUDGET = 10
ENTROPY = 0.05
_K3 = {"beta": 0.1, "use_bias_correction_kl": False}
_UNBIASED = {"beta": 0.1, "use_bias_correction_kl": True}
_MASK = {"off_policy_mask_threshold": 0.1}
_GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15}
_CISPO = {"loss_type": "cispo", "epsilon_high": 1.28}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo, clip higher": {"loss_type": "grpo", "epsilon_high": 0.28},
    "grpo, k3": {"loss_type": "grpo"} | _K3,
    "grpo, unbiased": {"loss_type": "grpo"} | _UNBIASED,
    "grpo, mask": {"loss_type": "grpo"} | _MASK,
    "grpo, unbiased, mask": {"loss_type": "grpo"} | _UNBIASED | _MASK,
    "grpo, entropy": {"loss_type": "grpo", "entropy_coef": ENTROPY},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dr_grpo, k3": {"loss_type": "dr_grpo"} | _K3,
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo, k3, entropy": {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": ENTROPY} | _K3,
    "gspo": _GSPO,
    "gspo, k3, mask": _GSPO | _K3 | _MASK,
    "gspo, unbiased": _GSPO | _UNBIASED,
    "cispo": _CISPO,
    "cispo, unbiased, mask": _CISPO | _UNBIASED | _MASK,
}
"""Options of GRPOConfig."""


class Given(trl.GRPOTrainer):
    """GRPOTrainer whose model says what it is told."""

    logps: torch.Tensor
    entropies: torch.Tensor

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> Any:
        return self.logps, self.entropies, None


def main() -> None:
    """Draw the inputs, ask TRL, write the file."""
    inputs = draw()
    cases = {}
    for name, options in CASES.items():
        loss, logps, entropies = compute(options, inputs)
        loss.backward()
        cases[name] = {
            "options": options,
            "loss": loss.item(),
            "gradient": rows(logps.grad),
            "entropy_gradient": None if entropies.grad is None else rows(entropies.grad),
        }
    FILE.write_text(
        json.dumps(
            {
                "made": f"benchmarks/trl_losses.py, trl {trl.__version__}, torch {torch.__version__}, fp64",
                "budget": BUDGET,
                "entropy_coef": ENTROPY,
                "inputs": inputs,
                "cases": cases,
            },
            indent=1,
        )
        + "\n"
    )


def draw() -> dict[str, Any]:
    """Log-probs of the current, old and reference policy, and entropies, by sequence; advantages."""
    rng = np.random.default_rng(20)
    current = [rng.normal(-1.2, 0.5, n).clip(max=-0.01) for n in LENGTHS]

    def near(spread: float) -> list[list[float]]:
        return [(row + rng.normal(0, spread, len(row))).round(6).tolist() for row in current]

    found = {"current": near(0), "old": near(0.25), "ref": near(0.4)}
    return found | {"entropy": near(0.1), "advantage": [0.75, -0.5, -1.0, 0.0, -0.25]}


def compute(
    options: dict[str, Any], inputs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, with the log-probs and entropies that it has gradients for."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(options, folder)
    trainer.current_gradient_accumulation_steps = 1
    mask = padded([[1.0] * n for n in LENGTHS])
    trainer.logps = padded(inputs["current"]).requires_grad_()
    trainer.entropies = padded(inputs["entropy"]).requires_grad_()
    ids = mask.long()
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": ids,
        "advantages": torch.tensor(inputs["advantage"], dtype=torch.float64),
        "old_per_token_logps": padded(inputs["old"]),
        "ref_per_token_logps": padded(inputs["ref"]),
        "num_items_in_batch": mask.sum(),
    }
    trainer.model.train()
    return trainer._compute_loss(trainer.model, batch), trainer.logps, trainer.entropies


def make(options: dict[str, Any], folder: str) -> Given:
    """A trainer of one micro-batch, with a model that is never asked."""
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=1, **shape))
    model.save_pretrained(folder)  # TRL reads its reference from there
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    return Given(
        model=folder,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="b"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=len(LENGTHS),
            num_generations=len(LENGTHS),
            max_completion_length=BUDGET,
            **options,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
    )


def padded(values: list[list[float]]) -> torch.Tensor:
    """[5, 7] fp64, zeros behind each sequence."""
    return torch.tensor([row + [0.0] * (max(LENGTHS) - len(row)) for row in values], dtype=torch.float64)


def rows(values: torch.Tensor) -> list[list[float]]:
    """Without the padding, whose gradient must be zero."""
    assert all(not row[n:].any() for row, n in zip(values, LENGTHS, strict=True))
    return [row[:n].tolist() for row, n in zip(values, LENGTHS, strict=True)]


if __name__ == "__main__":
    main()
