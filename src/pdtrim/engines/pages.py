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
from pdtrim.plan import LayerKV, PrunePlan, Stage


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


def pages_sent(plan: PrunePlan, layer: int, prompt_tokens: int, block_size: int) -> int:
    """Pages of a layer that decode reads which cross the wire for a prompt."""
    start, stop = hole_of(plan.kv[layer], prompt_tokens, block_size)
    return pages_of(prompt_tokens, block_size) - (stop - start)


def page_bytes(
    plan: PrunePlan,
    layer: int,
    block_size: int,
    itemsize: int,
    stage: Stage = "decode",
    ranks: int = 1,
) -> int:
    """Bytes of a stage's page: keys and values of one layer, all KV heads that the stage keeps.

    Args:
        ranks: that share the heads, the page being of one of them; more ranks than heads have a
            copy each.
    """
    heads = max(1, len(plan.kv_heads(stage, layer)) // ranks)
    return 2 * heads * plan.model.head_dim * block_size * itemsize


def bytes_sent(
    plan: PrunePlan, prompt_tokens: int, block_size: int, itemsize: int, ranks: int = 1
) -> int:
    """Bytes of the pages that cross the wire for a prompt, over all layers that decode reads.

    Args:
        ranks: that share the heads, the bytes being those of one of them.
    """
    return sum(
        pages_sent(plan, layer, prompt_tokens, block_size)
        * page_bytes(plan, layer, block_size, itemsize, ranks=ranks)
        for layer in plan.sent_layers
    )


def groups(plan: PrunePlan) -> tuple[int, int]:
    """How many groups vLLM makes of decode's layers, and layers of each.

    It gives all groups of a cache equally many layers: as many as the least kind has, or as the
    largest if that is less than 1.5 times as many (0.32). What does not divide is filled up.
    """
    kinds = Counter(plan.kv[layer].selector for layer in plan.sent_layers)
    if not kinds:
        return 0, 0
    least, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * least else least
    return sum(-(-count // size) for count in kinds.values()), size


def padding(plan: PrunePlan) -> int:
    """Layers whose pages decode allocates and does not use."""
    number, size = groups(plan)
    return number * size - len(plan.sent_layers)


def is_coded(plan: PrunePlan) -> bool:
    """Whether a layer travels in another form than pages."""
    return any(not isinstance(plan.kv[layer].codec, Raw) for layer in plan.sent_layers)


def shares_prefixes(plan: PrunePlan) -> bool:
    """Whether the pages of a prompt's first tokens are the same whatever follows them.

    A rule that drops tokens, and a codec, look at the whole prompt. Narrower blocks may share
    groups of a cache with others, of which vLLM's own manager keeps answers too.
    """
    return (
        plan.widths is None
        and not is_coded(plan)
        and all(isinstance(plan.kv[layer].selector, Full) for layer in plan.sent_layers)
    )


def check_servable(plan: PrunePlan, block_size: int, ranks: int = 1) -> None:
    """Raise PlanError unless pages of this size, on so many ranks, carry the plan's KV."""
    _check_ranks(plan, ranks)
    heads = {len(plan.kv_heads("decode", layer)) for layer in plan.sent_layers}
    if len(heads) > 1 and len({plan.kv[layer].selector for layer in plan.sent_layers}) > 1:
        raise PlanError(
            f"decode keeps {min(heads)} to {max(heads)} KV heads and its layers have different"
            " rules: vLLM's groups of layers need pages of one size; plan with one --kv rule for"
            " all layers, or equally many KV heads"
        )
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


def _check_ranks(plan: PrunePlan, ranks: int) -> None:
    if ranks > 1 and plan.widths is not None:
        raise PlanError(
            "pdtrim does not serve narrower blocks in tensor parallel: use a size of 1, or plan"
            " whole blocks"
        )
    heads = plan.model.num_kv_heads
    if heads % ranks and is_coded(plan):
        raise PlanError(
            f"pdtrim does not serve a plan with codecs of {heads} KV heads in tensor parallel"
            f" {ranks}: use a size that divides {heads}, or plan without a codec"
        )
