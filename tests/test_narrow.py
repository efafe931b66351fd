"""Narrower blocks: what they compute, in a model, a pair, its checkpoints and on the wire."""

import copy
import hashlib
import json
import struct
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers import first_last, make_plan, random_batch, reference_logits, tiny_config, tiny_model
from pdtrim.calibration.batches import Calibration
from pdtrim.engines.vllm.pages import check_servable
from pdtrim.errors import ModelError, PlanError
from pdtrim.evaluate.quality import Quality
from pdtrim.evaluate.result import make_row
from pdtrim.export import export, load_pair
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.frame import Layout, SentLayer, encode_frame
from pdtrim.kv.policy import HandoverPolicy, gather, hand_over
from pdtrim.kv.selectors import Duo, ExpectedAttention, SnapKV, Tova
from pdtrim.methods import Target
from pdtrim.methods.base import Found, Method
from pdtrim.models.checkpoint import load_stage
from pdtrim.models.model import Model
from pdtrim.models.narrow import narrow_blocks
from pdtrim.models.replacements import save_blocks
from pdtrim.plan import STAGES, Gates, LayerKV, PrunePlan, Width, Widths
from pdtrim.report.inspect import picture
from pdtrim.runtime.session import Session
from pdtrim.stage.cost import Lengths, removed_parameters, stage_flops
from pdtrim.stage.forward import Batch, Pair, forward
from pdtrim.stage.generate import prefill
from pdtrim.stage.replaced import pair_of

L, G, R, F = 4, 4, 2, 48  # layers, KV heads, query heads a KV head, neurons
BIASES = ("self_attn.o_proj.bias", "mlp.down_proj.bias")


def grouped(family, **changes):
    """A tiny model with enough KV heads to lose some; its head width is 8."""
    heads = {"num_attention_heads": G * R, "num_key_value_heads": G, "head_dim": 8}
    return tiny_model(family, layers=L, hidden_size=G * R * 8, **heads, **changes)


@pytest.fixture(scope="module")
def model():
    return grouped("llama")


def width(groups, step, biased=False):
    """All neurons but every ``step``-th."""
    neurons = [n for n in range(F) if n % step]
    return Width.of(groups=groups, neurons=neurons, num_neurons=F, biased=biased)


def widths():
    """Different a layer and a stage; decode's heads lie inside prefill's."""
    return Widths(
        prefill=(width((0, 2, 3), 5, True), None, width((1, 2), 3), width((0, 1, 2, 3), 2)),
        decode=(width((0, 3), 7, True), width((1, 3), 4, True), width((2,), 2), None),
    )


def biases(model, seed=3):
    """Values for the biases that :func:`widths` asks for."""
    generator = torch.Generator().manual_seed(seed)

    def drawn():
        return {name: torch.randn(model.config.hidden_size, generator=generator) for name in BIASES}

    return {"prefill": {0: drawn()}, "decode": {0: drawn(), 1: drawn()}}


def narrow_plan(model, folder=None, *, gates=None, kv=None, given=None, blocks=None):
    plan = make_plan(model, gates or Gates.dense(L), kv)
    blocks = blocks if blocks is not None else biases(model) if folder is not None else {}
    made = plan.model_copy(
        update={
            "widths": given or widths(),
            "replacements": save_blocks(blocks, {}, folder, "plan.blocks") if blocks else (),
        }
    )
    return PrunePlan.from_json(made.to_json())


def silenced(model, by_layer, blocks=None):
    """The dense model with the outputs of what the widths drop times zero, and with biases."""
    network = copy.deepcopy(model.network)
    for layer, kept in enumerate(by_layer):
        block = network.model.layers[layer]
        D = model.head_dim
        with torch.no_grad():
            for group in set(range(G)) - set(kept.groups) if kept else ():
                block.self_attn.o_proj.weight[:, group * R * D : (group + 1) * R * D] = 0
            for neuron in set(range(F)) - set(kept.kept_neurons) if kept else ():
                block.mlp.down_proj.weight[:, neuron] = 0
        for name, value in (blocks or {}).get(layer, {}).items():
            owner = block.get_submodule(name.removesuffix(".bias"))
            owner.bias = torch.nn.Parameter(value)
    return Model(network, name=model.name)


@torch.no_grad()
def two_models(prefill_model, decode_model, batch, gates):
    """Logits ``[B, C, V]`` of one causal forward in which each stage's tokens have their model.

    The models share all that makes queries, keys and values, so one attention serves both.
    """
    ids = torch.cat((batch.prompt_BP, batch.continuation_BC), dim=1)[:, :-1]
    T, N = ids.shape[1], batch.prompt_BP.shape[1] - 1
    is_decode = (torch.arange(T) >= N)[None, :, None]
    network = decode_model.network
    x = network.model.embed_tokens(ids)
    rope = network.model.rotary_emb(x, torch.arange(T)[None])
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    mask = torch.zeros(T, T).masked_fill(future, torch.finfo(torch.float32).min)[None, None]

    def stages_of(part, layer, prefill_on, decode_on):
        p, d = (part(m.network.model.layers[layer]) for m in (prefill_model, decode_model))
        return torch.where(is_decode, d * decode_on, p * prefill_on)

    for model in (prefill_model, decode_model):
        model.network.config._attn_implementation = "eager"
    for layer in range(L):
        h = network.model.layers[layer].input_layernorm(x)
        x = x + stages_of(
            lambda block, h=h: block.self_attn(
                hidden_states=h, position_embeddings=rope, attention_mask=mask
            )[0],
            layer,
            gates.prefill_attention[layer] == "full",
            gates.decode_attention[layer],
        )
        h = network.model.layers[layer].post_attention_layernorm(x)
        x = x + stages_of(
            lambda block, h=h: block.mlp(h),
            layer,
            gates.prefill_mlp[layer],
            gates.decode_mlp[layer],
        )
    return network.lm_head(network.model.norm(x[:, N:]))


GATES = (
    Gates.dense(L),
    Gates(
        prefill_attention=("full", "kv", "kv", "full"),
        prefill_mlp=(True, False, True, True),
        decode_attention=(True, True, False, True),
        decode_mlp=(True, True, True, False),
    ),
)


# --- one model ---


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_narrower_block_is_the_dense_one_with_silent_heads_and_neurons(family):
    model = grouped(family)
    if family == "qwen2":
        assert model.block(0).attention.q_proj.bias is not None
    batch, kept = random_batch(model), widths().prefill
    narrow = narrow_blocks(model, {i: w for i, w in enumerate(kept) if w})
    with torch.no_grad():
        ours = forward(Pair.dense(narrow), batch, GATES[0])
        plain = narrow.network(batch.prompt_BP).logits
        theirs = silenced(model, kept).network(batch.prompt_BP).logits
    wanted = reference_logits(silenced(model, kept), batch, GATES[0])
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, reference_logits(model, batch, GATES[0]), atol=1e-2)


def test_only_what_is_cut_is_copied(model):
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    narrow = narrow_blocks(model, {2: width((1, 2), 3)})
    old, new = (dict(m.network.named_parameters()) for m in (model, narrow))
    cut = {f"self_attn.{p}_proj" for p in "qkvo"} | {
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    }
    changed = {name for name in old if new[name] is not old[name]}
    assert changed == {f"model.layers.2.{part}.weight" for part in cut}
    assert all(torch.equal(p, before[name]) for name, p in old.items())
    attention = narrow.block(2).attention
    assert attention.k_proj.weight.shape[0] == 2 * 8 and attention.o_proj.weight.shape[1] == 32
    block = model.block(2).attention
    assert torch.equal(attention.k_proj.weight, block.k_proj.weight[8:24])
    assert torch.equal(attention.q_proj.weight, block.q_proj.weight[16:48])


# --- a pair ---


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_stages_of_different_widths_compute_what_two_silenced_models_do(family, gates, tmp_path):
    model = grouped(family)
    plan, batch = narrow_plan(model, tmp_path, gates=gates), random_batch(model, rows=3)
    pair = pair_of(plan, model, tmp_path)
    with torch.no_grad():
        ours = forward(pair, batch, gates, HandoverPolicy.of(plan))
    of = {s: silenced(model, plan.widths.of(s), biases(model)[s]) for s in STAGES}
    wanted = two_models(of["prefill"], of["decode"], batch, gates)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    bare = two_models(of["prefill"], silenced(model, plan.widths.decode), batch, gates)
    assert not torch.allclose(ours, bare, atol=1e-2)  # the biases matter


def test_equal_widths_share_one_model(model, tmp_path):
    same = Widths(prefill=widths().prefill, decode=widths().prefill)
    pair = pair_of(narrow_plan(model, given=same), model, None)
    assert pair.prefill is pair.decode and pair.decode is not model
    apart = pair_of(narrow_plan(model, tmp_path), model, tmp_path)
    assert apart.prefill is not apart.decode
    wide = Widths(prefill=(None,) * L, decode=widths().decode)
    assert pair_of(narrow_plan(model, given=wide), model, None).prefill is model


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_view_of_some_heads_is_the_view_of_a_block_that_has_no_others(family):
    model, prompt = grouped(family), random_batch(grouped(family), prompt=20).prompt_BP
    whole = dict(prefill(model, prompt, GATES[0]))[0]
    narrow = narrow_blocks(model, {0: width((0, 2, 3), 5)})
    few = dict(prefill(narrow, prompt, GATES[0]))[0].heads((1, 2))
    for view in (whole.heads((2, 3)), whole.heads((0, 2, 3)).heads((1, 2)), few):
        alone = narrow_blocks(model, {0: width((2, 3), 2)})
        wanted = dict(prefill(alone, prompt, GATES[0]))[0]
        for one in (lambda v: v, lambda v: v.row(1, 11)):
            ours, theirs = one(view), one(wanted)
            assert ours.k_BGND.shape[1] == 2
            for name in ("k_BGND", "v_BGND"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
            torch.testing.assert_close(ours.queries(5), theirs.queries(5))
            torch.testing.assert_close(ours.unrotated_queries(), theirs.unrotated_queries())
            torch.testing.assert_close(ours.output_weight(), theirs.output_weight())


@pytest.mark.parametrize(
    "selector",
    [SnapKV(window=3, share=0.6, value_norm=True), ExpectedAttention(share=0.5), Tova(share=0.5)],
    ids=lambda s: s.name,
)
def test_what_travels_is_chosen_among_the_heads_that_decode_keeps(model, selector):
    rules = (LayerKV(selector=selector),) * L
    plan = narrow_plan(model, kv=rules)
    prompt = random_batch(model, prompt=20).prompt_BP
    policy = HandoverPolicy.of(plan)
    assert policy.places == ((0, 2), (1, 3), (1,), None)
    view = dict(prefill(pair_of(plan, model, None).prefill, prompt, GATES[0]))[0]
    alone = narrow_blocks(model, {0: width((0, 3), 2)})
    wanted = dict(prefill(alone, prompt, GATES[0]))[0]
    assert torch.equal(policy.keep(0, view), selector.keep(wanted))
    plain = hand_over(HandoverPolicy(rules=rules), 0, wanted)
    for ours, theirs in zip(hand_over(policy, 0, view), plain, strict=True):
        assert ours.heads == theirs.heads
        torch.testing.assert_close(ours.k_BgMD, theirs.k_BgMD)
        assert torch.equal(ours.positions_BgM, theirs.positions_BgM)


# --- checkpoints ---


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_an_exported_stage_is_bit_for_bit_the_one_in_memory(family, gates, tmp_path):
    model = grouped(family)
    kv = (LayerKV(selector=SnapKV(window=3)), *(LayerKV(),) * 3)
    plan, batch = narrow_plan(model, tmp_path, gates=gates, kv=kv), random_batch(model)
    pair = pair_of(plan, model, tmp_path)
    back, read = load_pair(export(plan, model, tmp_path / "pair", blocks=tmp_path))
    assert read == plan and read.digest == plan.digest
    with torch.no_grad():
        ours, theirs = (forward(p, batch, gates, HandoverPolicy.of(plan)) for p in (pair, back))
    assert torch.equal(ours, theirs)
    for stage in STAGES:
        config = json.loads((tmp_path / "pair" / stage / "config.json").read_text())
        assert config["model_type"] == f"pdtrim_{family}"
    tensors = load_file(tmp_path / "pair" / "decode" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (16, 64)
    assert torch.equal(
        tensors["model.layers.0.mlp.down_proj.bias"], biases(model)["decode"][0][BIASES[1]]
    )


def test_any_width_makes_the_checkpoint_ours(model, tmp_path):
    one = Widths(prefill=(None,) * L, decode=(None, None, None, width((0, 1, 2, 3), 2)))
    export(narrow_plan(model, given=one, gates=GATES[0]), model, tmp_path / "pair")
    types = [
        json.loads((tmp_path / "pair" / stage / "config.json").read_text())["model_type"]
        for stage in STAGES
    ]
    assert types == ["llama", "pdtrim_llama"]


def test_weights_of_another_width_are_refused(model, tmp_path):
    name, bad = "mlp.down_proj.weight", tmp_path / "bad"
    narrow = model.block(0).module.get_parameter(name)[:, list(width((0,), 7).kept_neurons)]
    plan = narrow_plan(model, tmp_path, blocks={"decode": {0: {name: 2 * narrow}}})
    pair = pair_of(plan, model, tmp_path)
    assert torch.equal(pair.decode.block(0).module.mlp.down_proj.weight, 2 * narrow)
    assert torch.equal(pair.decode.block(0).module.mlp.down_proj.bias, torch.zeros(64))
    whole = {"decode": {0: {name: model.block(0).module.get_parameter(name)}}}
    with pytest.raises(PlanError, match=r"does not fit layer 0 .*\(64, 48\)"):
        pair_of(narrow_plan(model, bad, blocks=whole), model, bad)
    bias = {"decode": {2: {BIASES[0]: torch.zeros(64)}}}  # a layer that is not biased
    with pytest.raises(PlanError, match=r"see 'self_attn.o_proj.bias'"):
        pair_of(narrow_plan(model, bad, blocks=bias), model, bad)
    folder = export(plan, model, tmp_path / "pair", blocks=tmp_path)
    other = Widths(prefill=widths().prefill, decode=(width((0,), 7, True), *widths().decode[1:]))
    path = folder / "decode" / "config.json"
    data = json.loads(path.read_text())
    lying = narrow_plan(model, given=other)
    data["pdtrim"] |= {"plan": lying.to_json(), "plan_digest": lying.digest}
    path.write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"does not fit its plan: see 'model\.layers\.0"):
        load_stage(folder / "decode", "decode")


# --- real processes ---


def test_two_processes_generate_what_the_simulator_does(tmp_path):
    model = grouped("qwen2", eos_token_id=None)
    kv = (
        LayerKV(selector=SnapKV(window=3, share=0.6), codec=parse_codec("int8")),
        LayerKV(selector=Tova(share=0.6)),
        LayerKV(),
        first_last(2, 3),
    )
    plan = narrow_plan(model, tmp_path, gates=GATES[1], kv=kv)
    folder = export(plan, model, tmp_path / "pair", blocks=tmp_path)
    pair, policy = load_pair(folder)[0], HandoverPolicy.of(plan)
    prompts = random_batch(model, rows=2, prompt=14, new=4)
    with torch.no_grad():
        wanted = forward(pair, prompts, plan.gates, policy)
        alone = pair_of(plan, model, tmp_path)
        torch.testing.assert_close(forward(alone, prompts, plan.gates, policy), wanted)
    tokens = prompts.prompt_BP[:, :0]
    for _ in range(4):
        grown = torch.cat((tokens, tokens.new_zeros(2, 1)), dim=1)
        batch = Batch(prompt_BP=prompts.prompt_BP, continuation_BC=grown)
        with torch.no_grad():
            logits = forward(pair, batch, plan.gates, policy)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    with Session(folder) as session:
        torch.testing.assert_close(session.score(prompts), wanted, atol=1e-4, rtol=0)
        made = session.generate(prompts.prompt_BP.tolist(), max_new_tokens=4)
    assert [result.tokens for result in made] == tokens.tolist()


# --- the wire ---


@pytest.mark.parametrize("given", [None, widths()], ids=["whole", "narrow"])
def test_a_frame_is_its_head_its_table_and_the_heads_that_decode_keeps(model, given):
    gates = Gates.removing(L, decode={1})
    plan = make_plan(model, gates).model_copy(update={"widths": given})
    N, layout = 11, Layout.of(plan, torch.float32, 11)
    sent_heads = {i: len(plan.kv_heads("decode", i)) for i in (0, 2, 3)}
    assert sent_heads == ({0: 2, 2: 1, 3: 4} if given else {0: 4, 2: 4, 3: 4})
    layers, body, table = {}, b"", b""
    for layer, heads in sent_heads.items():
        k, v = torch.randn(2, 1, heads, N, 8)
        keep_GN = torch.ones(heads, N, dtype=torch.bool)
        groups = gather(SimpleNamespace(k_BGND=k, v_BGND=v), keep_GN[None])
        layers[layer] = SentLayer(keep_GN=keep_GN, groups=groups)
        body += k.numpy().tobytes() + v.numpy().tobytes()
        table += struct.pack("<HIQ", layer, 0, 2 * heads * N * 8 * 4)
    head = struct.pack(
        "<8sH32s16sIBHQ",
        *(b"PDTRIMKV", 1, bytes.fromhex(plan.digest), bytes(16), N, 2, 3, len(body)),
    )
    frame = b"".join(piece.numpy().tobytes() for piece in encode_frame(layout, bytes(16), layers))
    assert frame == head + table + body and layout.exact
    assert layout.frame_bytes == len(frame)


def test_the_mask_has_a_row_for_each_head_that_decode_keeps(model):
    plan = narrow_plan(model, kv=(LayerKV(selector=SnapKV()),) * L)
    rows = [entry.mask_rows for entry in Layout.of(plan, torch.float32, 9).entries]
    assert rows == [2, 2, 1, 4]
    whole = Layout.of(make_plan(model, GATES[0], plan.kv), torch.float32, 9)
    narrow = Layout.of(plan, torch.float32, 9)
    assert [e.data_bytes for e in narrow.entries] == [
        e.data_bytes * heads // G for e, heads in zip(whole.entries, (2, 2, 1, 4), strict=True)
    ]


# --- plans ---


def changed(data, stage, layer, **changes):
    data["widths"][stage][layer] = {**data["widths"][stage][layer], **changes}


@pytest.mark.parametrize(
    "spoil,words",
    [
        (lambda d: d["widths"]["decode"].pop(), "decode widths has 3 entries .* 4 layers"),
        (
            lambda d: changed(d, "prefill", 0, groups=[0, 3, 4]),
            "prefill keeps KV head 4 of layer 0",
        ),
        (lambda d: changed(d, "prefill", 0, groups=[3, 0]), "ascending head numbers"),
        (lambda d: changed(d, "prefill", 0, groups=[0, 0]), "ascending head numbers"),
        (lambda d: changed(d, "prefill", 0, groups=[-1, 0]), "ascending head numbers"),
        (lambda d: changed(d, "prefill", 0, groups=[]), "groups"),
        (
            lambda d: changed(d, "prefill", 0, groups=[0, 2]),
            r"layer 0: decode keeps KV heads \[3\]",
        ),
        (lambda d: changed(d, "decode", 2, neurons="00"), "neurons"),
        (lambda d: changed(d, "decode", 2, neurons="0g"), "neurons"),
        (lambda d: changed(d, "decode", 2, heads=[0]), "heads"),
        (lambda d: d["widths"].pop("decode"), "widths.decode"),
        (lambda d: d["kv"][2].update(selector={"name": "duo"}), "layer 2: 'duo' numbers all 4 KV"),
        (
            lambda d: d["kv"][0].update(
                selector={"name": "gate", "weights": "AAA=", "threshold": 0.0}
            ),
            "layer 0: 'gate' numbers all 4 KV heads, but decode keeps 2",
        ),
    ],
)
def test_bad_widths_are_told_in_one_line(model, spoil, words, tmp_path):
    data = narrow_plan(model).to_json()
    spoil(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=words) as error:
        PrunePlan.load(path)
    assert "\n" not in str(error.value)


def test_a_head_of_a_layer_that_nothing_reads_is_free(model):
    data = narrow_plan(model).to_json()
    changed(data, "prefill", 0, groups=[1])
    data["gates"]["decode_attention"][0] = False
    assert PrunePlan.from_json(data).sent_layers == (1, 2, 3)
    data["kv"][3]["selector"] = Duo(full_heads=(3,)).model_dump()  # a layer of all heads
    PrunePlan.from_json(data)


def test_neurons_that_the_model_lacks_are_told_when_it_is_cut(model, tmp_path):
    beyond = Width.of(groups=(0,), neurons=(1, F), num_neurons=F + 4)
    plan = narrow_plan(model, given=Widths(prefill=(None,) * L, decode=(beyond, *[None] * 3)))
    for make in (lambda: pair_of(plan, model, None), lambda: removed_parameters(model, plan)):
        with pytest.raises(PlanError, match="layer 0 has 4 KV heads and 48 MLP neurons") as error:
            make()
        assert "\n" not in str(error.value)


def test_widths_belong_to_the_digest_and_their_absence_does_not(model):
    plan = make_plan(model, GATES[0])
    old = {key: value for key, value in plan.to_json().items() if key != "widths"}
    assert PrunePlan.from_json(old).digest == plan.digest
    del old["provenance"]  # as plans were hashed before there were widths
    old["model"] = {"fingerprint": plan.model.fingerprint}
    text = json.dumps(old, sort_keys=True, separators=(",", ":"))
    assert plan.digest == hashlib.sha256(text.encode()).hexdigest()
    biased = Widths(prefill=widths().prefill, decode=(width((0, 3), 7), *widths().decode[1:]))
    digests = [plan.digest, narrow_plan(model).digest, narrow_plan(model, given=biased).digest]
    assert len(set(digests)) == 3


def test_a_width_holds_its_neurons():
    for neurons in ([0], [3, 4, 47], range(48), [46]):
        made = Width.of(groups=(1, 0), neurons=neurons, num_neurons=48)
        assert made.kept_neurons == tuple(neurons) and made.groups == (0, 1)
    assert Width.of(groups=(0,), neurons=(0, 5), num_neurons=6).neurons == "84"


# --- costs, pictures, methods, servers ---


PLANS = {
    "dense": {"given": Widths(prefill=(None,) * L, decode=(None,) * L), "blocks": {}},
    "narrow": {},
    "gates": {"gates": GATES[1].without_dead_work()},
    "selector": {"gates": GATES[1].without_dead_work(), "kv": (LayerKV(selector=SnapKV()),) * L},
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", PLANS)
def test_removed_parameters_are_those_that_the_files_lack(family, name, tmp_path):
    model = grouped(family)
    plan = narrow_plan(
        model, tmp_path, **{"gates": Gates.dense(L).without_dead_work()} | PLANS[name]
    )
    dense = make_plan(model, Gates.dense(L).without_dead_work(), plan.kv)

    def held(folder):
        return {
            stage: sum(
                tensor.numel()
                for key, tensor in load_file(folder / stage / "model.safetensors").items()
                if key.startswith("model.layers.")
            )
            for stage in STAGES
        }

    ours = held(export(plan, model, tmp_path / "ours", blocks=tmp_path))
    whole = held(export(dense, model, tmp_path / "dense"))
    removed = removed_parameters(model, plan)
    assert removed == pytest.approx({s: 1 - ours[s] / whole[s] for s in STAGES}, abs=1e-12)
    assert all((share == 0) == (name == "dense") for share in removed.values())
    assert removed_parameters(model, make_plan(model, Gates.dense(L))) == {
        "prefill": 0,
        "decode": 0,
    }


def test_operations_of_equal_widths_are_those_of_a_smaller_model(model):
    kept = width((0, 2), 4)
    narrow = Widths(prefill=(kept,) * L, decode=(kept,) * L)
    small = tiny_config(
        "llama",
        layers=L,
        hidden_size=64,
        head_dim=8,
        num_attention_heads=2 * R,
        num_key_value_heads=2,
        intermediate_size=len(kept.kept_neurons),
    )
    lengths, policy = (
        Lengths(prompt=30, continuation=9),
        HandoverPolicy(rules=(first_last(2, 3),) * L),
    )
    for gates in GATES:
        ours = stage_flops(model.config, gates, policy, lengths, widths=narrow)
        assert ours == stage_flops(small, gates, policy, lengths)
        assert ours < stage_flops(model.config, gates, policy, lengths)
    one = Widths(prefill=(None,) * L, decode=(kept,) * L)
    half = stage_flops(model.config, GATES[0], policy, lengths, widths=one)
    assert half[0] == stage_flops(model.config, GATES[0], policy, lengths)[0]
    assert half[1] == stage_flops(small, GATES[0], policy, lengths)[1]
    quality = Quality(kl_n=torch.zeros(2), nll_n=torch.ones(2))
    plan = narrow_plan(model, given=one)
    row = make_row("it", model, quality, plan, lengths=lengths, kv_bytes=1.0, dense_kv_bytes=2.0)
    assert row.prefill_flops_ratio == 1 and row.decode_flops_ratio < 0.9


def test_the_picture_shows_what_is_kept(model):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(picture(narrow_plan(model, gates=GATES[1])))
    lines = [line.split() for line in console.export_text().splitlines()]
    kept = {layer: widths().of(stage)[layer] for layer, stage in ((0, "prefill"), (2, "prefill"))}
    neurons = {layer: str(len(w.kept_neurons)) for layer, w in kept.items()}
    assert ["0", "3", "of", "4", neurons[0], "2", "of", "4", "41"] in lines
    assert ["1", "4", "of", "4", "all", "2", "of", "4", "36"] in lines
    assert ["2", "2", "of", "4", neurons[2], "1", "of", "4", "24"] in lines
    plain = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    plain.print(picture(make_plan(model, GATES[0])))
    assert "narrower" not in plain.export_text()


class Given(Method):
    """Finds what it was given."""

    name = "given"

    def __init__(self, found):
        self.found = found

    def search(self, model, calibration, target, *, progress, journal):
        return self.found


def test_a_method_may_find_widths_and_their_biases(model, tmp_path):
    batch = random_batch(model)
    text = Calibration(search=batch, rerank=batch, fit=batch, source="x", hash="0" * 64)
    rules = (LayerKV(),) * L
    bare = Found(gates=GATES[0], kv=rules, block_tokens=0, widths=widths())
    plan = Given(bare).plan(model, text, Target())
    assert plan.widths == widths() and plan.replacements == ()
    found = Found(gates=GATES[0], kv=rules, block_tokens=0, widths=widths(), blocks=biases(model))
    with pytest.raises(PlanError, match="'given' makes weights that go with the plan"):
        Given(found).plan(model, text, Target())
    made = Given(found).plan(model, text, Target(), output=tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == made and made.widths == widths()
    pair = pair_of(made, model, tmp_path)
    ours = pair.decode.block(1).module.mlp.down_proj.bias
    assert torch.equal(ours, biases(model)["decode"][1][BIASES[1]])
    duo = Found(gates=GATES[0], kv=(LayerKV(selector=Duo()),) * L, block_tokens=0, widths=widths())
    with pytest.raises(PlanError, match="method 'given': layer 0: 'duo' numbers all") as error:
        Given(duo).plan(model, text, Target())
    assert "\n" not in str(error.value)


def test_vllm_needs_whole_blocks(model):
    check_servable(make_plan(model, GATES[0]), block_size=16)
    with pytest.raises(PlanError, match="vLLM stages need whole blocks"):
        check_servable(narrow_plan(model), block_size=16)
