"""What a server is to pdtrim: the stage and the plan inside its checkpoint, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pdtrim.engines.pages import check_servable, is_coded, shares_prefixes
from pdtrim.errors import PlanError
from pdtrim.models.families import family_named
from pdtrim.plan import PrunePlan, Stage

ROLE_OF: dict[Stage, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}


@dataclass(frozen=True, kw_only=True)
class Served:
    """One stage of a plan, as a server runs it."""

    stage: Stage
    plan: PrunePlan

    @classmethod
    def of(cls, hf_config: Any) -> Served:
        """From a model's config.

        Raises:
            PlanError: not a checkpoint of pdtrim, or an altered one.
        """
        entry = getattr(hf_config, "pdtrim", None)
        if not isinstance(entry, dict):
            raise PlanError("this model was not exported by pdtrim: serve DIR/prefill, DIR/decode")
        plan = PrunePlan.from_json(entry.get("plan"), source="config.json")
        if entry.get("plan_digest") != plan.digest or entry.get("stage") not in ROLE_OF:
            raise PlanError("config.json: the plan does not match its digest; export it again")
        return cls(stage=entry["stage"], plan=plan)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Dense layer of each slot of the checkpoint."""
        return self.plan.gates.layers(self.stage)

    @property
    def whole(self) -> bool:
        """Whether all blocks of the checkpoint are whole ones of the dense model."""
        return self.plan.whole_blocks(self.stage) == len(self.layers)


def slot_of(name: str) -> int:
    """The slot in a name such as ``model.layers.3.self_attn.attn``."""
    return int(name.split("layers.")[1].split(".")[0])


def prefill_to_decode(plan: PrunePlan) -> dict[int, int]:
    """Slots of prefill's checkpoint whose KV decode reads, to decode's slots."""
    prefill = {layer: slot for slot, layer in enumerate(plan.gates.layers("prefill"))}
    decode = {layer: slot for slot, layer in enumerate(plan.gates.layers("decode"))}
    return {prefill[layer]: decode[layer] for layer in plan.sent_layers}


def check_config(config: Any) -> Served:
    """What a server's settings come to.

    Args:
        config: a ``VllmConfig``.

    Raises:
        PlanError: a setting under which the pair would not run as planned, in one line.
    """
    served = Served.of(config.model_config.hf_config)
    transfer, cache, parallel = (
        config.kv_transfer_config,
        config.cache_config,
        config.parallel_config,
    )
    if transfer.kv_role != ROLE_OF[served.stage]:
        raise PlanError(
            f"the {served.stage} checkpoint cannot serve as {transfer.kv_role}: give it"
            f" {ROLE_OF[served.stage]}"
        )
    decode = served.stage == "decode"
    shared = decode and cache.enable_prefix_caching
    refused = {
        "prefix caching on decode under a plan that drops tokens, codes them or narrows blocks:"
        " pass --no-enable-prefix-caching": shared and not shares_prefixes(served.plan),
        "prefix caching on decode beside local_prefill count: pass --no-enable-prefix-caching": (
            shared and transfer.get_from_extra_config("local_prefill", "refuse") != "refuse"
        ),
        "speculative decoding: drop --speculative-config": config.speculative_config is not None,
        "pipeline parallelism: use --pipeline-parallel-size 1": parallel.pipeline_parallel_size > 1,
        "context parallelism: use sizes of 1": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "LoRA: drop --enable-lora": config.lora_config is not None,
        "sleep mode: drop --enable-sleep-mode": config.model_config.enable_sleep_mode,
        "kv_load_failure_policy other than fail: decode would run prompts on its own blocks": (
            decode and transfer.kv_load_failure_policy != "fail"
        ),
        "enforce_handshake_compat false: layers would meet the wrong layers": not (
            transfer.get_from_extra_config("enforce_handshake_compat", True)
        ),
    }
    for what, is_so in refused.items():
        if is_so:
            raise PlanError(f"pdtrim does not serve with {what}")
    if is_coded(served.plan):
        _check_coded(config)
    hf_config = config.model_config.hf_config
    kinds = getattr(hf_config, "layer_types", None) or ()
    family = family_named(served.plan.model.family)
    slots = range(len(served.layers))
    if "sliding_attention" in kinds or any(family.window_of(hf_config, i) for i in slots):
        raise PlanError("pdtrim does not serve sliding-window attention on vLLM: use the runtime")
    check_servable(served.plan, cache.block_size, parallel.tensor_parallel_size)
    return served


def _check_coded(config: Any) -> None:
    """What a plan with codecs needs beside."""
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    if config.cache_config.cache_dtype not in ("auto", dtype):
        raise PlanError(
            f"pdtrim does not serve a plan with codecs from a {config.cache_config.cache_dtype}"
            " cache: drop --kv-cache-dtype"
        )
