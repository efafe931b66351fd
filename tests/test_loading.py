"""Models are read whole and as transformers means them, or refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import export, make_plan, random_batch, tiny_config, tiny_model
from pdtrim.errors import ModelError, NotFinite, border
from pdtrim.models.loading import load_model
from pdtrim.models.mistral import MistralBlock
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.stage.forward import Pair, forward

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_folder):
    """A folder of a tiny Llama with a tokenizer, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("good") / "model"
    shutil.copytree(tiny_folder, folder)
    return folder


@pytest.fixture
def spoilt(good, tmp_path):
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    data = json.loads((folder / "config.json").read_text())
    data.update(changes)
    (folder / "config.json").write_text(json.dumps(data))


def weights(change):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})

    return spoil


def renamed(prefix):
    return weights(lambda w: {prefix + name: part for name, part in w.items()})


def without(part):
    return weights(lambda w: {name: x for name, x in w.items() if part not in name})


def cut(name):
    def spoil(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return spoil


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def config(**changes):
    return lambda folder: edit(folder, **changes)


def put_nan(w):
    w["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    return w


def shards(weight_map):
    def spoil(folder):
        (folder / WEIGHTS).unlink()
        put("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))(folder)

    return spoil


def fp8(w):
    name = "model.layers.0.mlp.up_proj.weight"
    return {**w, name: w[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(())}


def fifth_layer(w):
    more = {n.replace("layers.3", "layers.4"): x.clone() for n, x in w.items() if "layers.3" in n}
    return {**w, **more}


SPOILT = {
    "a layer is missing": (without("layers.3."), r"lacks the weights 'model\.layers\.3"),
    "the head is missing": (without("lm_head"), r"lacks the weights 'lm_head\.weight'"),
    "a layer too many": (weights(fifth_layer), r"does not have, 'model\.layers\.4"),
    "wrapped": (renamed("module."), r"names begin with 'module\.'"),
    "compiled": (renamed("_orig_mod."), r"names begin with '_orig_mod\.'"),
    "adapted": (renamed("base_model.model."), r"names begin with 'base_model\.model\.'"),
    "another width": (config(intermediate_size=64), r"config makes it \(32, 64\)"),
    "stored as fp8": (weights(fp8), "as F8_E4M3: quantised or packed"),
    "a scale beside": (
        weights(lambda w: {**w, "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}),
        "architecture does not have",
    ),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "quantised by 'gptq'"),
    "modelopt": (put("hf_quant_config.json", "{}"), "quantised by 'modelopt'"),
    "an adapter beside": (put("adapter_config.json", "{}"), "holds an adapter"),
    "not a number": (weights(put_nan), r"'model\.layers\.1\.mlp\.up_proj\.weight' hold NaN"),
    "cut weights": (cut(WEIGHTS), "download it again"),
    "no weights": (put(WEIGHTS, ""), "cut short"),
    "pointer weights": (put(WEIGHTS, POINTER), "git lfs pull"),
    "a shard is missing": (shards({"lm_head.weight": "a.safetensors"}), r"lacks 'a\.safetensors'"),
    "a shard outside": (shards({"lm_head.weight": "../a.safetensors"}), "outside of the folder"),
    "consolidated": (
        lambda f: (f / WEIGHTS).rename(f / "consolidated.safetensors"),
        r"only 'consolidated\.safetensors'",
    ),
    "cut config": (cut("config.json"), "not valid JSON"),
    "list config": (put("config.json", "[]"), "names no 'model_type'"),
    "untyped config": (config(model_type=None), "names no 'model_type'"),
    "pointer config": (put("config.json", POINTER), "git lfs pull"),
    "huge config": (config(hidden_size=10**9, head_dim=8), "different models|cannot load"),
    "endless layers": (config(num_hidden_layers=10**9), "num_hidden_layers '1000000000'"),
    "dynamic rope": (
        config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "scales RoPE by 'dynamic'",
    ),
    "longrope": (
        config(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
                "factor": 8.0,
            }
        ),
        "scales RoPE by 'longrope'",
    ),
    "su": (config(rope_parameters={"rope_type": "su", "factor": 8.0}), "scales RoPE by 'su'"),
    "a factor of zero": (
        config(rope_parameters={"rope_type": "linear", "factor": 0, "rope_theta": 1e4}),
        "positive number as factor",
    ),
    "llama3 without its factors": (
        config(rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}),
        "positive number as|low_freq_factor",
    ),
    "partial rotary": (config(partial_rotary_factor=0.5), "a part of each head"),
    "a width as text": (config(vocab_size="64"), "vocab_size '64' is not a whole number"),
    "a negative width": (config(intermediate_size=-1), "intermediate_size '-1'"),
    "uneven heads": (config(num_key_value_heads=3), "do not share 3 KV heads"),
    "another activation": (config(hidden_act="nonsense"), "nonsense"),
    "an infinite epsilon": (config(rms_norm_eps=1e400), "rms_norm_eps|is not valid JSON"),
    "an end of text": (config(eos_token_id=["x"]), "eos_token_id"),
    "cut special tokens": (put("generation_config.json", "{"), "generation_config.json"),
    "list of special tokens": (put("generation_config.json", "[]"), "is no object"),
    "pad beyond": (config(pad_token_id=64), "pad_token_id 64 is beyond the vocabulary"),
    "cut tokenizer": (cut("tokenizer.json"), "not valid JSON"),
    "pointer tokenizer": (put("tokenizer.json", POINTER), "git lfs pull"),
    "newer tokenizer": (
        put("tokenizer.json", json.dumps({"version": "9.0", "model": {"type": "BPE2"}})),
        "cannot read the tokenizer",
    ),
    "tokenizer config alone": (lambda f: (f / "tokenizer.json").unlink(), "no vocabulary"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_whole_or_not_understood_is_refused_in_one_line(spoilt, name):
    spoil, words = SPOILT[name]
    spoil(spoilt)
    with pytest.raises(ModelError if "number" not in name else NotFinite, match=words) as caught:
        load_model(str(spoilt), dtype="float32")
    assert "\n" not in str(caught.value)


def test_half_precision_that_overflows_is_refused(spoilt):
    weights(lambda w: {**w, "model.norm.weight": w["model.norm.weight"] * 1e6})(spoilt)
    load_model(str(spoilt), dtype="float32")
    with pytest.raises(NotFinite, match=r"'model\.norm\.weight' hold NaN or infinity"):
        load_model(str(spoilt), dtype="float16")


def test_harmless_differences_are_read(spoilt, good):
    wanted = load_model(str(good), dtype="float32").fingerprint
    tensors = load_file(spoilt / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, spoilt / WEIGHTS, {"format": "pt"})
    assert load_model(str(spoilt), dtype="float32").fingerprint == wanted
    bare = {n.removeprefix("model."): x for n, x in load_file(good / WEIGHTS).items()}
    save_file(bare, spoilt / WEIGHTS, {"format": "pt"})  # as the bare decoder saves itself
    named = spoilt.rename(spoilt.with_name("folder.gguf"))
    assert load_model(str(named), dtype="float32").fingerprint == wanted


def test_a_tied_head_may_be_stored_only_as_it_is(tmp_path):
    tiny_model("qwen2").network.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / WEIGHTS, {"format": "pt"})
    load_model(str(tmp_path), dtype="float32")
    save_file({**tensors, "lm_head.weight": head + 1}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match="stores another head"):
        load_model(str(tmp_path), dtype="float32")


def logits(model, batch):
    with torch.no_grad():
        return forward(Pair.dense(model), batch, Gates.dense(model.num_layers))


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROPES)
def test_each_allowed_rope_is_the_same_alone_and_in_company(tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    made = tiny_model("llama", rope_parameters=rope)
    made.network.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="float32")
    batch = random_batch(model, rows=2, prompt=40, new=8)
    ids = torch.cat((batch.prompt_BP, batch.continuation_BC), 1)
    with torch.no_grad():
        theirs = made.network(ids).logits[:, 39:-1]
    torch.testing.assert_close(logits(model, batch), theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(model, batch[:1]), theirs[:1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {"sliding_window": 8}, [None] * 4),
        ("llama", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}, [None] * 4),
        ("mistral", {"sliding_window": 8, "use_sliding_window": False}, [8] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("phi3", {"sliding_window": 8}, [8] * 4),
        ("phi3", {"sliding_window": None}, [None] * 4),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, [None] * 4),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            [None, None, 8, 8],
        ),
    ],
)
def test_a_window_is_what_the_family_does(tmp_path, family, changes, windows):
    tiny_model(family).network.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    for key in ("layer_types", *changes):
        data.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps({**data, **changes}))
    model = load_model(str(tmp_path), dtype="float32")  # the guard runs past the window
    assert [model.block(layer).window for layer in range(4)] == windows


def test_the_guard_sees_a_window_that_pdtrim_does_not(tmp_path, monkeypatch):
    tiny_model("mistral").network.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        load_model(str(tmp_path), dtype=dtype)
    monkeypatch.setattr(MistralBlock, "window_of", classmethod(lambda cls, config, slot: None))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ModelError, match="does not know of: its block 0 differs"):
            load_model(str(tmp_path), dtype=dtype)


def test_a_strangers_attention_is_not_fetched(spoilt):
    edit(spoilt, attn_implementation="someone/kernel", _attn_implementation="someone/kernel")
    model = load_model(str(spoilt), dtype="float32")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("window", [0, -1, "8", 2.5])
def test_a_window_that_is_no_number_of_tokens_is_refused(tmp_path, window):
    tiny_model("mistral").network.save_pretrained(tmp_path)
    edit(tmp_path, sliding_window=window)
    with pytest.raises(ModelError, match="sliding_window"):
        load_model(str(tmp_path))


def test_a_mistral_that_transformers_takes_for_another_is_refused(tmp_path):
    tiny_model("mistral").network.save_pretrained(tmp_path)
    edit(tmp_path, layer_types=["full_attention"] * 4)
    with pytest.raises(ModelError, match="Ministral"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_in_memory_is_held_to_the_same_ropes(kind):
    config = tiny_config("llama", layers=1)
    config.rope_parameters = {**config.rope_parameters, "rope_type": kind, "factor": 2.0}
    if kind == "longrope":
        config.rope_parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    network = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=f"RoPE by '{kind}'"):
        Model(network)


def test_keys_that_act_are_left_out_of_a_config(spoilt):
    """A stranger's config can ask for a kernel of the hub, another file, other outputs."""
    before = load_model(str(spoilt), dtype="float32")
    edit(
        spoilt,
        attn_implementation="kernels-community/flash-attn",
        _attn_implementation="flash_attention_2",
        auto_map={"AutoModelForCausalLM": "evil.Model"},
        transformers_weights="other.safetensors",
        return_dict=False,
        output_hidden_states=True,
        torch_dtype="nonsense",
        per_layer_config={"0": {"hidden_size": 7}},
        fusion_config={"x": 1},
        num_labels="x",
    )
    model = load_model(str(spoilt), dtype="float32")
    assert model.config._attn_implementation == "sdpa"
    assert model.fingerprint == before.fingerprint
    for name in ("auto_map", "transformers_weights", "fusion_config"):
        assert not hasattr(model.config, name)


def test_only_special_tokens_of_a_generation_config_are_kept(spoilt, tmp_path):
    """Llama 2 and Vicuna name a temperature without sampling, which transformers will not write."""
    strange = {"eos_token_id": [2, 5], "bos_token_id": 1, "temperature": 0.9, "top_p": 0.6}
    put("generation_config.json", json.dumps(strange))(spoilt)
    model = load_model(str(spoilt), dtype="float32")
    model.network.generation_config.temperature = 0.9  # as a model built in memory may have it
    export(make_plan(model, Gates.dense(4)), model, tmp_path / "pair")
    written = json.loads((tmp_path / "pair" / "decode" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 5] and written["bos_token_id"] == 1
    assert not {"temperature", "top_p"} & set(written)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("low_freq_factor"), "m: KeyError: 'low_freq_factor'"),
        (RuntimeError("Error in loading:\n\n\tsize mismatch for x\n"), "m: Error in loading"),
        (MemoryError(), "m: MemoryError"),
        (type("PanicException", (BaseException,), {})("index out of range"), "index out of range"),
    ],
)
def test_any_exception_of_a_library_becomes_one_line(error, words):
    with pytest.raises(ModelError, match=words), border(ModelError, "m"):
        raise error


def test_an_interrupt_is_no_error_of_the_model():
    with pytest.raises(KeyboardInterrupt), border(ModelError, "m"):
        raise KeyboardInterrupt
