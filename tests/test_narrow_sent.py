"""Narrower blocks in checkpoints, in real processes and on the wire."""

import hashlib
import json
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from helpers import export, first_last, forge, frame_of, make_plan, pair_of, random_batch, trim_of
from narrow_models import BIASES, GATES, G, L, R, biases, grouped, narrow_plan, width, widths
from pdtrim.errors import ModelError, PlanError
from pdtrim.exported import load_pair
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.frame import Layout, SentLayer
from pdtrim.kv.policy import HandoverPolicy, gather
from pdtrim.kv.selectors import SnapKV, Tova
from pdtrim.models.checkpoint import load_stage
from pdtrim.plan import STAGES, Gates, LayerKV, Widths
from pdtrim.runtime.session import Session
from pdtrim.stage.forward import Batch, forward


@pytest.fixture(scope="module")
def model():
    return grouped("llama")


# --- checkpoints ---


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_an_exported_stage_is_bit_for_bit_the_one_in_memory(family, gates, tmp_path):
    model = grouped(family)
    kv = (LayerKV(selector=SnapKV(window=3)), *(LayerKV(),) * 3)
    plan, batch = narrow_plan(model, tmp_path, gates=gates, kv=kv), random_batch(model)
    pair = pair_of(plan, model, tmp_path)
    back, read = load_pair(trim_of(plan, tmp_path).export(model, tmp_path / "pair"))
    assert read == plan and read.digest == plan.digest
    with torch.no_grad():
        ours, theirs = (forward(p, batch, gates, HandoverPolicy.of(plan)) for p in (pair, back))
    assert torch.equal(ours, theirs)
    for stage in STAGES:
        config = json.loads((tmp_path / "pair" / stage / "config.json").read_text())
        assert config["model_type"] == f"pdtrim_{family}"
    tensors = load_file(tmp_path / "pair" / "decode" / "model.safetensors")
    name = f"model.layers.0.{model.block(0).making('keys').name}.weight"
    shape = (2 * (R + 2) * 8 if family == "phi3" else 16, 64)  # two KV heads of width 8
    assert tensors[name].shape == shape
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
    folder = trim_of(plan, tmp_path).export(model, tmp_path / "pair")
    other = Widths(prefill=widths().prefill, decode=(width((0,), 7, True), *widths().decode[1:]))
    path = folder / "decode" / "config.json"
    data = json.loads(path.read_text())
    lying = narrow_plan(model, given=other)
    data["pdtrim"] |= {"plan": lying.to_json(), "plan_digest": lying.digest}
    path.write_text(json.dumps(data))
    forge(folder / "decode")
    with pytest.raises(ModelError, match=r"does not fit its plan: see 'model\.layers\.0"):
        load_stage(folder / "decode", "decode")


# --- real processes ---


@pytest.mark.usefixtures("warm_stages")
def test_two_processes_generate_what_the_simulator_does(tmp_path):
    model = grouped("qwen2", eos_token_id=None)
    kv = (
        LayerKV(selector=SnapKV(window=3, share=0.6), codec=parse_codec("int8")),
        LayerKV(selector=Tova(share=0.6)),
        LayerKV(),
        first_last(2, 3),
    )
    plan = narrow_plan(model, tmp_path, gates=GATES[1], kv=kv)
    folder = trim_of(plan, tmp_path).export(model, tmp_path / "pair")
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
def test_a_frame_is_its_head_and_the_heads_that_decode_keeps_layer_by_layer(model, given):
    gates = Gates.removing(L, decode={1})
    plan = make_plan(model, gates).model_copy(update={"widths": given})
    N, layout = 11, Layout.of(plan, torch.float32, 11)
    sent_heads = {i: len(plan.kv_heads("decode", i)) for i in (0, 2, 3)}
    assert sent_heads == ({0: 2, 2: 1, 3: 4} if given else {0: 4, 2: 4, 3: 4})
    head = (b"PDTRIMKV", 4, bytes.fromhex(plan.digest), bytes(16), N, 2, 3, 0)
    layers, wanted = {}, struct.pack("<8sH32s16sIBHH", *head)
    for layer, heads in sent_heads.items():
        k, v = torch.randn(2, 1, heads, N, 8)
        keep_GN = torch.ones(heads, N, dtype=torch.bool)
        groups = gather(SimpleNamespace(k_BGND=k, v_BGND=v), keep_GN[None])
        layers[layer] = SentLayer(keep_GN=keep_GN, groups=groups)
        wanted += struct.pack("<HIQ", layer, 0, 2 * heads * N * 8 * 4)
        wanted += k.numpy().tobytes() + v.numpy().tobytes()
        wanted += hashlib.sha256(wanted).digest()
    frame = frame_of(layout, bytes(16), layers)
    assert frame == wanted and layout.exact
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
