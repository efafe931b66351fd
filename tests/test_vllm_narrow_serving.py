"""Narrower blocks on real vLLM servers: stages of other widths than each other and than the model.

Two pairs: Llama raw and with whole prompts, Qwen2 coded and trimmed. On the CPU, over loopback.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("vllm")

from pdtrim.engines.pages import bytes_sent, page_bytes
from pdtrim.engines.ranges import Form
from pdtrim.exported import load_pair
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.loading import load_model
from pdtrim.plan import LayerKV, Width, Widths
from pdtrim.stage.forward import Pair
from vllm_servers import (
    BLOCK,
    DTYPE,
    LENGTHS,
    RULE,
    agree,
    commands,
    completion,
    idle,
    post,
    prompt_of,
    running,
    tiny_pair,
    tokens_of,
    until,
)

pytestmark = pytest.mark.slow

HIDDEN, NEURONS = 256, 96
SIZES = {"hidden_size": HIDDEN, "num_attention_heads": 8, "num_key_value_heads": 4}
BIASES = ("self_attn.o_proj.bias", "mlp.down_proj.bias")


def width(*groups, step=7, biased=False):
    """Those KV heads, and all neurons but every ``step``-th."""
    neurons = [n for n in range(NEURONS) if n % step]
    return Width.of(groups=groups, neurons=neurons, num_neurons=NEURONS, biased=biased)


WIDTHS = Widths(
    prefill=(
        *(None, width(0, 2, 3, biased=True), width(1, 2, step=3), width(0, 1)),
        *(width(0, 1, 2, 3, step=2), width(0, 1, 3), None, width(1, 2, 3)),
    ),
    decode=(
        *(width(1, 3, biased=True), width(0, 3, step=5), width(2), width(2, 3, step=4)),
        *(None, width(1, 3), width(2, step=9), width(1, 2, 3)),
    ),
)
"""Under GATES: what prefill keeps and decode does not lies before, between and behind the rest."""


def narrow_pair(folder, tokenizer, kv, family):
    generator = torch.Generator().manual_seed(3)
    values = iter(torch.randn(4, HIDDEN, generator=generator).to(DTYPE))
    blocks = {
        "prefill": {1: {BIASES[0]: next(values)}},  # its MLP is closed
        "decode": {0: {name: next(values) for name in BIASES}},
    }
    return tiny_pair(folder, tokenizer, kv, family, widths=WIDTHS, blocks=blocks, **SIZES)


def said(router):
    """The answers to all prompts, eight at once."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: post(router.url, completion(prompt_of(n))), LENGTHS))
    return {n: tokens_of(answer) for n, answer in zip(LENGTHS, made, strict=True)}


def test_tokens_are_the_simulators_and_only_decodes_heads_travel(tmp_path, tiny_folder):
    folder = narrow_pair(tmp_path, tiny_folder, (LayerKV(),) * 8, "llama")
    simulated = load_pair(folder)
    _, plan = simulated
    with running(commands(folder), tmp_path) as (source, decode, router):
        tokens = said(router)
        wrong = [n for n in LENGTHS if not agree(simulated, prompt_of(n), tokens[n])]
        assert not wrong
        until(lambda: decode.metric("pdtrim:handover_seconds_count") == len(LENGTHS))
        sent = decode.metric("vllm:nixl_bytes_transferred_sum")
        assert sent == sum(bytes_sent(plan, n, BLOCK, DTYPE.itemsize) for n in LENGTHS)
        pages = sum(-(-n // BLOCK) for n in LENGTHS)
        assert decode.metric("vllm:nixl_num_descriptors_sum") <= pages * len(plan.sent_layers)
        made = [page_bytes(plan, i, BLOCK, DTYPE.itemsize, "prefill") for i in plan.sent_layers]
        skipped = decode.metric("pdtrim:kv_bytes_skipped_total", reason="head")
        assert skipped == pages * sum(made) - sent > 0
        head = 2 * 32 * DTYPE.itemsize
        assert decode.metric("pdtrim:kv_bytes_per_token") == head * (2 + 2 + 1 + 4 + 2 + 1 + 3)
        until(lambda: idle(source, decode))
    whole = Pair.dense(load_model(str(tmp_path / "m"), dtype="float32"))
    dense = (whole, plan.model_copy(update={"widths": None}))
    assert not any(agree(dense, prompt_of(n), tokens[n]) for n in LENGTHS)


def test_codecs_and_holes_are_of_the_heads_that_decode_keeps(tmp_path, tiny_folder):
    """Biases of keys and values too, which codecs do not see: those of the heads that travel."""
    tie = 0.05
    codecs = [parse_codec(name) for name in ("int4:group=32,recent=8", "entropy")]
    kv = [LayerKV(selector=RULE.selector, codec=codecs[layer % 2]) for layer in range(8)]
    kv[2] = RULE
    folder = narrow_pair(tmp_path, tiny_folder, kv, "qwen2")
    simulated = load_pair(folder)
    _, plan = simulated
    with running(commands(folder), tmp_path) as (source, decode, router):
        tokens = said(router)
        wrong = [n for n in LENGTHS if not agree(simulated, prompt_of(n), tokens[n], tie=tie)]
        assert not wrong
        whole = HandoverPolicy(rules=(LayerKV(),) * 8, places=HandoverPolicy.of(plan).places)
        assert not all(agree(simulated, prompt_of(n), tokens[n], whole, tie) for n in LENGTHS)
        until(lambda: decode.metric("pdtrim:handover_seconds_count") == len(LENGTHS))
        forms = [Form.of(plan, DTYPE, n, BLOCK) for n in LENGTHS]
        assert decode.metric("vllm:nixl_bytes_transferred_sum") < sum(form.most for form in forms)
        until(lambda: idle(source, decode))
