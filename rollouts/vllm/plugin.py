"""The entry point for vLLM: makes our architecture known, and changes nothing else.

vLLM calls register() in every process it starts, also for people who serve other models: our class is chosen only by
who asks for its name. Ask with hf_overrides, as engine.py does, or on the command line:
    vllm serve CHECKPOINT --hf-overrides '{"architectures": ["PosttrainDsaForCausalLM"], "model_type": "posttrain_dsa"}'
The model type keeps vLLM's own MLA settings away. Next: model.py.
"""

ARCHITECTURE = "PosttrainDsaForCausalLM"
MODEL_TYPE = "posttrain_dsa"
OVERRIDES = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}


def register() -> None:
    """Add our architecture to vLLM's registry; by name, so that nothing of it is imported until it is asked for."""
    from vllm import ModelRegistry  # vLLM is importing this module

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "posttrain.rollouts.vllm.model:DsaForVllm")
