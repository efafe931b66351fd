"""The benchmarks of handovers and of stages: what they count and run, not how fast that is."""

import json
import sys
from contextlib import closing

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from helpers import SIZES, tiny_model
from pdtrim.bench.configs import StagesConfig, TransferConfig
from pdtrim.bench.lanes import Lane
from pdtrim.bench.nixl_link import NixlLink
from pdtrim.bench.pipeline import Machines, Pipeline
from pdtrim.bench.removal import bench_stages, removing
from pdtrim.bench.rounds import arrival
from pdtrim.bench.shapes import SHAPES, one_block, random_model, shape_config
from pdtrim.bench.traffic import LayerSent, Sizes, layers_sent, paged, paper_rule, random_cache
from pdtrim.bench.transfer import bench_transfer
from pdtrim.cli import app
from pdtrim.errors import PdtrimError
from pdtrim.kv.codecs import parse_codec
from pdtrim.plan import Gates
from pdtrim.stage.generate import prefill

CPU = torch.device("cpu")
LAYERS, HEADS, TOKENS, WIDTH = 5, 2, 200, 8
TINY = Sizes(layers=LAYERS, heads=HEADS, tokens=TOKENS, width=WIDTH)
PAIR = 2 * HEADS * WIDTH * 2  # bytes of a token of a layer in bf16
POLICIES = ("full", "full+int4:group=32", "streaming:last=60+int8", "full+entropy")


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    config = {**SIZES, "model_type": "llama", "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def report(shape):
    links = ("measured", "0.001", "0.002")
    config = TransferConfig(tokens=TOKENS, links=links, policies=POLICIES, repeats=2)
    return bench_transfer(shape, config)


def of_link(report, link):
    return {row["name"]: row for row in report["rows"] if row["link"].split()[0] == link}


def test_a_link_has_a_row_for_each_way_and_its_bytes_are_those_of_the_codec(report):
    rows = of_link(report, "measured")
    assert report["raw_bytes"] == LAYERS * TOKENS * PAIR

    def coded(codec, tokens):
        return LAYERS * parse_codec(codec).nbytes(HEADS, tokens, WIDTH, torch.bfloat16)

    sizes = {name: row["bytes"] for name, row in rows.items()}
    k, v = random_cache(TINY, torch.bfloat16, CPU)
    entropy = [parse_codec("entropy").encode(k[i], v[i]).numel() for i in range(LAYERS)]
    assert sizes == {
        "bf16, blocking": LAYERS * TOKENS * PAIR,
        "bf16 by pages of 16, blocking": LAYERS * 13 * 16 * PAIR,
        "paper's rule": (1 * TOKENS + 4 * 80) * PAIR,
        "full": LAYERS * TOKENS * PAIR,
        "full+int4:group=32": coded("int4:group=32", TOKENS),
        "streaming:last=60+int8": coded("int8", 64),
        "full+entropy": sum(entropy),
    }
    assert all(row["gbit"] == row["bytes"] * 8 / 1e9 and not row["paced"] for row in rows.values())


def test_times_are_there_for_what_a_row_does(report):
    for row in report["rows"]:
        blocking = row["name"].endswith("blocking")
        for part in ("encode_s", "decode_s"):
            assert (row[part]["most"] == 0) == blocking
        for part in ("move_s", "in_turn_s", "exposed_s"):
            assert 0 < row[part]["least"] <= row[part]["median"] <= row[part]["most"]
        if blocking:
            assert row["exposed_s"] == row["in_turn_s"] == row["move_s"]
        assert row["in_turn_s"]["least"] >= row["move_s"]["least"] + row["encode_s"]["least"]
        assert row["gb_s"] == row["bytes"] / row["move_s"]["median"] / 1e9
        assert row["share_of_copy"] == row["gb_s"] / report["copy_gb_s"]
    assert report["copy_gb_s"] == report["raw_bytes"] / report["copy_s"]["median"] / 1e9
    assert report["prefill_s"]["least"] > 0


def test_a_paced_link_takes_as_long_as_its_bytes(report):
    slow, fast = of_link(report, "0.001"), of_link(report, "0.002")
    assert slow.keys() == fast.keys() == of_link(report, "measured").keys()
    for name, row in slow.items():
        assert row["paced"] and "paced" in row["link"]
        assert row["move_s"]["median"] == pytest.approx(row["bytes"] * 8 / 1e6)
        assert row["move_s"]["median"] == pytest.approx(2 * fast[name]["move_s"]["median"])
        assert row["gb_s"] == pytest.approx(0.001 / 8)
        # the link carries layer after layer, the first of them while prefill goes on
        moved = row["move_s"]["least"]
        hidden = 0 if name.endswith("blocking") else 10 * report["prefill_s"]["most"]
        assert moved - hidden <= row["exposed_s"]["least"]


def test_arrival_by_hand():
    # the link is free at 3, 7, 8; the decoder at 4, 8, 10
    assert arrival([1.0, 2.0, 6.0], [2.0, 4.0, 1.0], [1.0, 1.0, 2.0]) == 10.0
    # and waits for a layer that is encoded late
    assert arrival([-9.0, 5.0], [1.0, 0.5], [1.0, 0.25]) == 5.75


@pytest.fixture
def machines():
    sizes = Sizes(layers=4, heads=2, tokens=50, width=8)
    model = tiny_model("llama", layers=1)
    return Machines(model, random_cache(sizes, torch.bfloat16, CPU), sizes, CPU)


class Spy(LayerSent):
    """Writes down what is decoded."""

    def decode(self, data, sizes, dtype):
        pair = super().decode(data, sizes, dtype)
        SEEN.append(pair)
        return pair


SEEN = []


@pytest.mark.parametrize("decode", [True, False])
def test_the_receiver_decodes_every_layer_in_order_and_what_the_codec_makes_of_it(machines, decode):
    codec = parse_codec("int4:group=32")
    SEEN.clear()
    run = Pipeline(machines).run([Spy(codec=codec, kept_GM=None, tokens=50)] * 4, decode=decode)
    assert len(SEEN) == (4 if decode else 0)
    for layer, pair in enumerate(SEEN):
        wanted = codec.round_trip(*machines.kv_2LGND[:, layer])
        assert all(torch.equal(*both) for both in zip(pair, wanted, strict=True))
    assert run.encoded_s == sorted(run.encoded_s) and run.exposed_s > 0 < run.prefill_s


class Broken(LayerSent):
    def encode(self, k_GND, v_GND):
        raise PdtrimError("cannot encode")


@pytest.mark.parametrize("fails", ["encode", "decode", "prefill"])
def test_a_part_that_fails_ends_the_run_with_its_error(machines, fails, monkeypatch):
    sent = LayerSent(codec=parse_codec("raw"), kept_GM=None, tokens=50)
    if fails == "encode":
        sent = Broken(codec=sent.codec, kept_GM=None, tokens=50)
    if fails == "decode":  # another length than what comes
        sent = LayerSent(codec=sent.codec, kept_GM=None, tokens=49)
    if fails == "prefill":
        monkeypatch.setattr(machines, "prefill", lambda layer, x: 1 / 0)
    with pytest.raises((PdtrimError, ZeroDivisionError)):
        Pipeline(machines).run([sent] * 4, decode=True)


def test_a_machines_prefill_is_the_stages_own():
    # one block stands for all, so a model whose blocks are all that one must compute the same
    model = tiny_model("qwen2", layers=3)
    for layer in (1, 2):
        model.blocks[layer] = model.blocks[0]
    sizes = Sizes(layers=3, heads=2, tokens=9, width=8)
    made = Machines(model, random_cache(sizes, torch.float32, CPU), sizes, CPU)
    ids = torch.arange(9)[None]
    x = model.embed(ids)
    for layer in range(2):
        x = made.prefill(layer, x)
    *_, (last, view) = prefill(model, ids, Gates.dense(3))
    assert last == 2 and torch.equal(view.h_BNE, model.block(0).attention_norm(x))
    assert torch.equal(made.prefill(2, x), x)  # only keys and values are left to make


def test_nixl_moves_the_bytes_into_another_process_and_the_rows_take_its_times(shape):
    pytest.importorskip("nixl")
    said = []
    config = TransferConfig(
        tokens=TOKENS, links=("measured", "0.001"), policies=("full+int8",), repeats=1,
        transport="nixl",
    )  # fmt: skip
    report = bench_transfer(shape, config, say=said.append)
    assert [report["slow_link"]] == (said or [None]) and report["transport"] == "nixl"
    measured, paced = of_link(report, "measured,"), of_link(report, "0.001")
    assert measured.keys() == paced.keys() and len(paced) == 4
    for name, row in paced.items():
        assert row["move_s"]["median"] == pytest.approx(row["bytes"] * 8 / 1e6)
        assert measured[name]["link"] == "measured, by NIXL" and measured[name]["gb_s"] > 0
    with closing(NixlLink(CPU, CPU, 9000)) as link:
        data = torch.arange(4000, dtype=torch.int16)
        for pieces in (1, 16):
            data += 1
            assert link.move(data, pieces) > 0
            assert link.received(8000) == int(data.view(torch.uint8).sum())


def test_nixl_that_is_not_there_is_named_with_what_installs_it(shape, monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(PdtrimError, match=r"pip install pdtrim\[nixl\]"):
        bench_transfer(shape, TransferConfig(tokens=9, policies=(), transport="nixl"))


def test_pages_hold_the_tokens_of_a_layer_together():
    kv = random_cache(Sizes(layers=2, heads=3, tokens=21, width=4), torch.float32, CPU)
    pages = paged(kv, 16)
    assert pages.shape == (2, 2, 2, 16, 3, 4) and pages.is_contiguous()
    assert torch.equal(pages[1, 1, 0, 4], kv[0, 1, :, 20])
    assert torch.equal(pages[0, 0, 1, 7], kv[1, 0, :, 7])
    assert not pages[:, 1, :, 5:].any()


def test_the_papers_rule_sends_what_the_paper_says_of_llama():
    config = shape_config("llama-3.1-8b")
    sizes = Sizes(layers=config.num_hidden_layers, heads=8, tokens=3824, width=128)
    assert sizes.raw_bytes(torch.bfloat16) * 8 / 1e9 == pytest.approx(4.01, abs=0.005)
    sent = layers_sent(paper_rule(sizes), sizes, CPU)
    tokens = [layer.tokens for layer in sent]
    assert tokens.count(3824) == 6 and tokens.count(80) == 26
    share = sum(tokens) / (32 * 3824)
    assert share * 4.01 == pytest.approx(0.82, abs=0.005)
    kept = next(layer.kept_GM for layer in sent if layer.kept_GM is not None)
    assert kept[5].tolist() == [0, 1, 2, 3, *range(3748, 3824)]


@pytest.mark.parametrize(
    ("shape", "params", "kv_bytes"),
    [
        ("llama-3.1-8b", 8_030_261_248, 131_072),
        ("llama-2-13b", 13_015_864_320, 819_200),
        ("qwen2.5-7b", 7_615_616_512, 57_344),
    ],
)
def test_named_shapes_have_the_published_sizes(shape, params, kv_bytes):
    config = shape_config(shape)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    assert sum(part.numel() for part in network.parameters()) == params
    width = config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_key_value_heads
    assert 2 * heads * width * 2 == kv_bytes
    assert set(SHAPES) >= {shape}


def test_one_block_of_a_shape_is_a_block_of_it(shape):
    whole, one = shape_config(shape), one_block(shape_config(shape))
    models = [random_model(c, dtype=torch.bfloat16, device=CPU, name="x") for c in (whole, one)]
    assert (models[0].num_layers, models[1].num_layers) == (LAYERS, 1)
    parts = [dict(m.block(0).module.named_parameters()) for m in models]
    assert {n: p.shape for n, p in parts[0].items()} == {n: p.shape for n, p in parts[1].items()}
    assert models[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policies": ("snapkv:share=0.5",)}, "must see a prompt"),
        ({"policies": ("duo:share=0.5,last=60",)}, "must see a prompt"),
        ({"policies": ("first_last:last=60",)}, "must see a prompt"),
        ({"policies": ("budget:compression=3",)}, "must see a prompt"),
        ({"policies": ("first_last:layers=9",)}, "layers=9"),
        ({"links": ("quick",)}, "link 'quick'"),
        ({"links": ("-1",)}, "link '-1'"),
        ({"links": ("inf",)}, "link 'inf'"),
        ({"tokens": 0}, "at least one"),
        ({"repeats": 0}, "at least one"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"transport": "pigeon"}, "unknown transport"),
        ({"device": "meta"}, "no device 'meta'"),
        ({"device": "nonsense"}, "no device 'nonsense'"),
        ({"device": "cuda:77"}, "GPUs here"),
    ],
)
def test_what_cannot_be_timed_is_refused(shape, change, words):
    with pytest.raises(PdtrimError, match=words):
        place = {name: change.pop(name) for name in ("device", "dtype") if name in change}
        bench_transfer(shape, TransferConfig(**{"tokens": 20, "policies": (), **change}), **place)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shares": (1.0,)}, "below 1"),
        ({"tokens": 0}, "from 1 on"),
        ({"device": "nonsense"}, "no device 'nonsense'"),
        ({"device": "cuda:77"}, "GPUs here"),
        ({"dtype": "int8"}, "unknown dtype"),
    ],
)
def test_stages_that_cannot_be_timed_are_refused(shape, change, words):
    with pytest.raises(PdtrimError, match=words):
        place = {name: change.pop(name) for name in ("device", "dtype") if name in change}
        bench_stages(shape, StagesConfig(**{"tokens": 20, **change}), **place)


def test_a_shape_that_is_none_is_refused(tmp_path):
    with pytest.raises(PdtrimError, match=r"llama-3\.1-8b"):
        shape_config("llama-9")
    with pytest.raises(PdtrimError, match="no shape"):
        shape_config(str(tmp_path))


@pytest.mark.parametrize(("layers", "count"), [(32, 11), (6, 3), (4, 0), (5, 4)])
def test_stages_lose_as_many_blocks_as_they_are_said_to(layers, count):
    first, second = removing(layers, count)
    # prefill's last block is dead work but for its keys and values, removed or not
    assert first.blocks("prefill") == layers - 1 - count
    assert first.prefill_attention.count("kv") == count + 1
    assert first.blocks("decode") == layers
    assert second.blocks("decode") == layers - count


def test_stages_are_timed_beside_the_operations_they_lose(shape):
    report = bench_stages(shape, StagesConfig(tokens=30, shares=(0.4,), repeats=2))
    rows = {(row["stage"], row["removed"]): row for row in report["rows"]}
    assert list(rows) == [("prefill", 0), ("prefill", 2), ("decode", 0), ("decode", 2)]
    for (_, removed), row in rows.items():
        assert row["seconds"]["least"] > 0 and row["faster"]["least"] > 0
        assert row["flops_removed"] == pytest.approx(1 - 1 / row["flops_faster"])
        assert row["share"] == removed / LAYERS
        if not removed:
            assert row["faster"]["median"] == row["flops_faster"] == 1
    # multiply-adds of a token: a block's four projections and its MLP, and 16.5 or 31 keys
    E, F, V = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    kv, rest = E * E, 2 * E * E + 3 * E * F
    whole = 30 * (5 * kv + 4 * rest) + 4 * 2 * E * 30 * 31 / 2
    less = 30 * (5 * kv + 2 * rest) + 2 * 2 * E * 30 * 31 / 2
    assert rows["prefill", 2]["flops_faster"] == pytest.approx(whole / less)
    token = kv + rest + 2 * E * 31
    assert rows["decode", 2]["flops_faster"] == pytest.approx(
        (5 * token + E * V) / (3 * token + E * V)
    )


def test_the_verbs_write_their_results_and_a_table(shape, tmp_path):
    for verb, more, words in (
        ("bench-transfer", ("--kv", "full+int8", "--link", "5"), ("full+int8", "5 Gbit/s, paced")),
        ("bench-stages", ("--share", "0.5"), ("prefill | 2 of 5", "launched from Python")),
    ):
        folder = tmp_path / verb
        arguments = [verb, "--shape", shape, "--tokens", "40", "--repeats", "1", *more]
        shown = CliRunner().invoke(app, [*arguments, "-o", str(folder)])
        assert shown.exit_code == 0, shown.output
        table = (folder / "table.md").read_text(encoding="utf-8")
        saved = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert all(word in table for word in words) and table.strip() in shown.output
        assert saved["tokens"] == 40 and len(saved["rows"]) == table.count("\n|") - 2


def test_a_lane_of_a_cpu_keeps_time_by_the_clock():
    lane = Lane(CPU)
    with lane.work():
        first = lane.mark()
    assert lane.reached(first) == first <= lane.mark()
