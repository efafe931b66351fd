"""vLLM's models, made into a stage of a plan.

The model is built as vLLM builds it, with as many blocks as the checkpoint has slots. Then blocks
are made as narrow as the plan has them (``widths.py``), those whose gates are not all open are
replaced by their gated form (``blocks.py``), and decode's layers under a ``first_last`` rule get
the trimmed attention and cache (``attention.py``, ``cache.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from pdtrim.engines.vllm import blocks, compat
from pdtrim.engines.vllm.attention import SharedAttention, trim
from pdtrim.engines.vllm.blocks import GatedBlock
from pdtrim.engines.vllm.stage import Served
from pdtrim.engines.vllm.widths import arranged, narrow
from pdtrim.errors import PlanError
from pdtrim.kv.selectors import FirstLast
from pdtrim.models.families import family_named


class Staged:
    """Mixed into a model of vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        compat.check()
        served = Served.of(vllm_config.model_config.hf_config)
        layers: Any = self.model.layers  # type: ignore[attr-defined]
        if vllm_config.quant_config is not None and not served.whole:
            raise PlanError(
                "a stage of partial or narrower blocks is not served quantised: drop --quantization"
            )
        narrow(layers, served, vllm_config)
        close_gates(layers, served, vllm_config)
        if served.stage == "decode":
            trim_layers(layers, served)
            if vllm_config.cache_config.enable_prefix_caching:
                for block in layers:
                    if block.self_attn is not None:
                        block.self_attn.attn.__class__ = SharedAttention
        self._served = served

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, as the stage's blocks take them."""
        config: Any = self.config  # type: ignore[attr-defined]
        queries = config.num_attention_heads // config.num_key_value_heads
        made: Any = super().load_weights(  # type: ignore[misc]
            arranged(weights, self._served, queries)
        )
        return set(made)


def close_gates(blocks_L: nn.ModuleList, served: Served, vllm_config: Any) -> None:
    """Replace the blocks of which the stage runs a part only."""
    blocks.register()
    splits = vllm_config.compilation_config.splitting_ops
    if splits and blocks.SPLITS not in splits:  # none where nothing is compiled in pieces
        splits.append(blocks.SPLITS)
    attention, mlp = served.plan.gates.of(served.stage)
    fused = "queries" in family_named(served.plan.model.family).making("keys").makes
    for slot, layer in enumerate(served.layers):
        if attention[layer] in ("full", True) and mlp[layer]:
            continue
        whole: Any = blocks_L[slot]
        blocks_L[slot] = GatedBlock(whole, attention=attention[layer], mlp=mlp[layer], fused=fused)
        if attention[layer] in ("off", False):
            del vllm_config.compilation_config.static_forward_context[
                whole.self_attn.attn.layer_name
            ]


def trim_layers(blocks_L: nn.ModuleList, served: Served) -> None:
    """Put decode's layers under their rules."""
    for slot, layer in enumerate(served.layers):
        selector = served.plan.kv[layer].selector
        if layer in served.plan.sent_layers and isinstance(selector, FirstLast):
            block: Any = blocks_L[slot]
            trim(block.self_attn.attn, first=selector.first, last=selector.last)


class PDTrimLlamaForCausalLM(Staged, LlamaForCausalLM):
    """Llama and its kin."""


class PDTrimPhi3ForCausalLM(Staged, Phi3ForCausalLM):
    """Phi-3, whose projections are fused in its checkpoints."""


class PDTrimQwen2ForCausalLM(Staged, Qwen2ForCausalLM):
    """Qwen2 and 2.5."""


class PDTrimQwen3ForCausalLM(Staged, Qwen3ForCausalLM):
    """Qwen3."""
