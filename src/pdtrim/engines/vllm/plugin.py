"""What vLLM calls in each of its processes: the entry point ``vllm.general_plugins``.

It adds names and changes nothing: a model that pdtrim did not export runs as without it.
"""

from __future__ import annotations

import logging

FAMILIES = {"llama": "Llama", "phi3": "Phi3", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def register() -> None:
    """Add pdtrim's models, configs and cache; may be called more than once."""
    import vllm
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from pdtrim.models.checkpoint import PREFIX

    try:
        from pdtrim.engines.vllm import cache
    except (ImportError, AttributeError) as error:  # plain vLLM must go on working
        logging.getLogger("vllm.pdtrim").warning(
            "pdtrim cannot serve: it does not fit vLLM %s (%s)", vllm.__version__, error
        )
        return
    cache.register()
    for family, title in FAMILIES.items():
        base = type(AutoConfig.for_model(family))
        config = type(f"PDTrim{base.__name__}", (base,), {"model_type": PREFIX + family})
        AutoConfig.register(PREFIX + family, config, exist_ok=True)
        name = f"PDTrim{title}ForCausalLM"
        ModelRegistry.register_model(name, f"pdtrim.engines.vllm.models:{name}")
