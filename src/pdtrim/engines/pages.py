"""Pages of a request's KV cache: which of them a layer's rule drops, and what a plan sends.

A page holds ``block_size`` tokens of one layer. An engine can send, hold or free pages only, so a
``first_last`` rule drops the pages between the first and the last runs, rounded outward as
``kv/selectors/first_last.py`` does. Decode computes the prompt's last token itself: of N prompt
tokens N - 1 are handed over, in the ceil(N / block_size) pages that prefill wrote.
"""

from __future__ import annotations

from collections import Counter

from pdtrim.errors import PlanError
from pdtrim.kv.codecs import Raw
from pdtrim.kv.selectors import FirstLast, Full
from pdtrim.plan import LayerKV, PrunePlan


def pages_of(tokens: int, block_size: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // block_size)


def hole(prompt_tokens: int, block_size: int, *, first: int, last: int) -> tuple[int, int]:
    """Pages ``[start, stop)`` of the prompt that ``first_last`` drops; start = stop if none."""
    start = pages_of(first, block_size)
    return start, max(start, max(0, prompt_tokens - 1 - last) // block_size)


def hole_of(rule: LayerKV, prompt_tokens: int, block_size: int) -> tuple[int, int]:
    """The same for a layer's rule."""
    if isinstance(rule.selector, FirstLast):
        selector = rule.selector
        return hole(prompt_tokens, block_size, first=selector.first, last=selector.last)
    assert isinstance(rule.selector, Full)
    return 0, 0


def pages_sent(plan: PrunePlan, prompt_tokens: int, block_size: int) -> int:
    """Pages that cross the wire for a prompt, over all layers that decode reads."""
    whole = pages_of(prompt_tokens, block_size)
    holes = (hole_of(plan.kv[i], prompt_tokens, block_size) for i in plan.sent_layers)
    return sum(whole - (stop - start) for start, stop in holes)


def page_bytes(plan: PrunePlan, block_size: int, itemsize: int) -> int:
    """Bytes of a page: keys and values of one layer, all KV heads."""
    return 2 * plan.model.num_kv_heads * plan.model.head_dim * block_size * itemsize


def padding(plan: PrunePlan) -> int:
    """Layers whose pages decode allocates and does not use.

    vLLM gives all groups of a cache equally many layers: as many as the least kind has, or as the
    largest if that is less than 1.5 times as many (0.32). What does not divide is filled up.
    """
    kinds = Counter(plan.kv[layer].selector for layer in plan.sent_layers)
    if not kinds:
        return 0
    least, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * least else least
    return sum(-count % size for count in kinds.values())


def is_coded(plan: PrunePlan) -> bool:
    """Whether a layer travels in another form than pages."""
    return any(not isinstance(plan.kv[layer].codec, Raw) for layer in plan.sent_layers)


def check_servable(plan: PrunePlan, block_size: int) -> None:
    """Raise PlanError unless vLLM has the plan's blocks, and pages of this size carry its KV."""
    if plan.widths is not None:
        raise PlanError("vLLM stages need whole blocks: run the pair with 'pdtrim generate'")
    for layer in plan.sent_layers:
        rule = plan.kv[layer]
        if not isinstance(rule.selector, Full | FirstLast):
            raise PlanError(
                f"layer {layer}: vLLM's pages cannot hold what '{rule.selector.name}' keeps: plan"
                " with --kv full or first_last"
            )
        if isinstance(rule.selector, FirstLast) and plan.block_size != block_size:
            raise PlanError(
                f"the plan drops prompt tokens in pages of {plan.block_size}, the engine's hold"
                f" {block_size}: plan again with --block-size {block_size}"
            )
