"""Tokens in and out of an engine's pages, by its own writer, by gathering and by rows."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from pdtrim.engines.ranges import Form
from pdtrim.engines.vllm import pages_io
from pdtrim.engines.vllm.coded_worker import CodedWorker
from pdtrim.errors import PlanError
from pdtrim.kv.codecs import parse_codec
from test_vllm_coded import BLOCK, served


def cpu_attention(dtype, head_dim, block):
    """What of an attention layer its cache writer looks at."""
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.backends import cpu_attn

    impl = SimpleNamespace(attn_type=AttentionType.DECODER, kv_cache_dtype="auto")
    write = partial(cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update, impl)
    return SimpleNamespace(
        attn_backend=cpu_attn.CPUAttentionBackend,
        impl=SimpleNamespace(do_kv_cache_update=write),
        isa=cpu_attn._get_attn_isa(dtype, block, head_dim),
        _k_scale_float=1.0,
        _v_scale_float=1.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_what_the_cpu_backend_wrote_is_read(dtype, head_dim):
    attention = cpu_attention(dtype, head_dim, BLOCK)
    cache = torch.full((9, 2, BLOCK, 2 * head_dim), 9.0, dtype=dtype)
    pages_io.check_readable(attention, cache)
    assert (cache == 9).all(), "the trial leaves the cache alone"
    written = torch.randn(2, 2, 75, head_dim).to(dtype)
    pages_B = pages_io.numbers([7, 2, 5], cache.device)
    pages_io.scatter(attention, cache, pages_io.slots(pages_B, BLOCK, written.shape[2]), *written)
    for tokens in (0, 1, 32, 33, 75):
        read = pages_io.gather(attention, cache, pages_B, tokens)
        assert torch.equal(torch.stack(read), written[:, :, :tokens])
    untouched = [page for page in range(9) if page not in (7, 2, 5)]
    assert (cache[untouched] == 9).all()


def flash_attention():
    """Its writer runs on GPUs only; this one writes as its ``do_kv_cache_update`` does."""

    def write(layer, key_MGD, value_MGD, cache, slots_M):
        D, page = key_MGD.shape[-1], cache.shape[2]
        for rows, new in zip(cache.transpose(1, 2).split(D, -1), (key_MGD, value_MGD), strict=True):
            rows[slots_M // page, slots_M % page] = new

    return SimpleNamespace(
        attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
        impl=SimpleNamespace(do_kv_cache_update=write),
    )


def flash_cache(kind, pages=9, heads=3, head_dim=16, dtype=torch.bfloat16):
    """As an engine lays pages out: by tokens, by heads, beside other layers, with odd padding."""
    whole = heads * BLOCK * 2 * head_dim
    strides = {
        "tokens": (whole, 2 * head_dim, heads * 2 * head_dim, 1),
        "heads": (whole, BLOCK * 2 * head_dim, 2 * head_dim, 1),
        "packed": (4 * whole, 2 * head_dim, heads * 2 * head_dim, 1),
        "padded": (whole + 8, 2 * head_dim, heads * 2 * head_dim, 1),
    }[kind]
    base = torch.randn(pages * strides[0] + 64).to(dtype)
    return base.as_strided((pages, heads, BLOCK, 2 * head_dim), strides, 64)


@pytest.mark.parametrize("kind", ["tokens", "heads", "packed", "padded"])
def test_flash_attentions_pages_are_rows(kind):
    """What codecs read and write by rows is what the backend has in its pages."""
    attention, cache = flash_attention(), flash_cache(kind)
    pages_io.check_readable(attention, cache)
    rows = pages_io.rows_of(attention, cache, heads=2)
    if kind == "padded":
        assert rows is None, "no whole rows to a page"
        return
    pages_B = pages_io.numbers([7, 2, 5], cache.device)
    at_M = pages_io.slots(pages_B, BLOCK, 75, rows.step)
    read = pages_io.gather(attention, cache, pages_B, 75)
    for x_GTD, read_GMD in zip((rows.k_GTD, rows.v_GTD), read, strict=True):
        assert torch.equal(x_GTD[:, at_M], read_GMD[:2])
    before = cache.clone()
    k, v = torch.randn(2, 2, 75, 16).bfloat16()
    raw, kept = parse_codec("raw"), at_M.expand(1, 2, -1)
    raw.decode_layers(raw.encode(k, v)[None], [(rows.k_GTD, rows.v_GTD)], kept)
    read = torch.stack(pages_io.gather(attention, cache, pages_B, 75))
    assert torch.equal(read[:, :2], torch.stack((k, v)))
    assert torch.equal(cache[:, 2], before[:, 2]), "the third head does not travel"
    others = [page for page in range(9) if page not in (7, 2, 5)]
    assert torch.equal(cache[others], before[others])
    assert torch.equal(cache[5, :, 75 - 64 :], before[5, :, 75 - 64 :])


def test_an_unknown_layout_is_refused(monkeypatch):
    attention = cpu_attention(torch.float32, 32, BLOCK)
    cache = torch.zeros(4, 2, BLOCK, 64)
    monkeypatch.setitem(pages_io.LAYOUTS, "CPU_ATTN", pages_io.LAYOUTS["FLASH_ATTN"])
    with pytest.raises(PlanError, match="CPU_ATTN keeps its pages in a form"):
        pages_io.check_readable(attention, cache)
    monkeypatch.delitem(pages_io.LAYOUTS, "CPU_ATTN")
    with pytest.raises(PlanError, match="choose --attention-backend CPU_ATTN or FLASH_ATTN"):
        pages_io.check_readable(attention, cache)


def worker(stage, attention, cache_of, codec):
    """What of a worker its encoding and decoding look at: two groups of pages on decode."""
    made = object.__new__(CodedWorker)
    made.served = served(stage, codec)
    sent = made.served.plan.sent_layers
    made._caches = {layer: f"layer {layer}" for layer in sent}
    made._context = dict.fromkeys(made._caches.values(), attention)
    made.device_kv_caches = {name: cache_of() for name in made._caches.values()}
    made._rows = {}
    for layer in sent:
        if rows := pages_io.rows_of(*made._cache_of(layer), 2):
            made._rows[layer] = rows
    made._staging = torch.zeros(2**20, dtype=torch.uint8)
    made._bias = SimpleNamespace(
        taken_from=lambda part, tokens, kv: kv, added_to=lambda part, tokens, kv: kv
    )
    made._form = lambda n: Form.of(made.served.plan, torch.float32, n, BLOCK)
    made._kernel_pages = lambda pages: pages
    groups = {name: int(layer == 2) for layer, name in made._caches.items()}
    made.kv_cache_config = SimpleNamespace(transfer_group_index_by_layer=groups)
    return made


@pytest.mark.parametrize("codec", ["int4:group=32,recent=8", "entropy"])
def test_pages_travel_by_rows_as_by_gathering(codec):
    """Between caches of different strides, and layers whose pages are others."""
    tokens, pages = 75, [7, 2, 5]
    cpu = cpu_attention(torch.float32, 32, BLOCK)
    flat = lambda kind: flash_cache(kind, heads=2, head_dim=32, dtype=torch.float32)  # noqa: E731
    source = worker("prefill", flash_attention(), lambda: flat("heads"), codec)
    other = worker("prefill", cpu, lambda: torch.zeros(9, 2, BLOCK, 64), codec)
    target = worker("decode", flash_attention(), lambda: flat("tokens"), codec)
    assert len(source._rows) == len(target._rows) == 4 and not other._rows
    at_M = pages_io.slots(pages_io.numbers(pages, torch.device("cpu")), BLOCK, tokens)
    written = {}
    for layer in source._caches:
        written[layer] = torch.randn(2, 2, tokens, 32)
        for made in (source, other):
            pages_io.scatter(*made._cache_of(layer), at_M, *written[layer])
    form, nonce = source._form(tokens), bytes(16)
    sizes = [
        form.write(made._staging, nonce, made._kept(form, pages, tokens))
        for made in (source, other)
    ]
    assert sizes[0] == sizes[1] and torch.equal(source._staging, other._staging)
    groups = ([1, 4, 6], [8, 0, 3])
    target._decode(source._staging[: sizes[0]], nonce, tokens, groups)
    for part in form.parts:
        kept = len(groups[0]) - (part.hole[1] - part.hole[0])
        here = pages_io.numbers(groups[int(part.layer == 2)][:kept], torch.device("cpu"))
        read = torch.stack(pages_io.gather(*target._cache_of(part.layer), here, part.tokens))
        start, stop = (page * BLOCK for page in part.hole)
        whole = written[part.layer][:, :, : tokens - 1]
        sent = torch.cat((whole[:, :, :start], whole[:, :, stop:]), 2)
        assert torch.equal(read, torch.stack(part.codec.round_trip(*sent)))
