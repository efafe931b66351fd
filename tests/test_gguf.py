"""GGUF files: their weights exactly, their RoPE scaling, and what is refused."""

import gguf
import numpy as np
import pytest
import torch

from gguf_files import write_gguf
from helpers import random_batch, tiny_model
from pdtrim.errors import ModelError
from pdtrim.models.gguf import FREQUENCIES, read_gguf
from pdtrim.models.loading import load_model
from pdtrim.models.rope import llama3_factors_F, llama3_of
from pdtrim.plan import Gates
from pdtrim.stage.forward import Pair, forward

ROPE3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}


def logits(model, batch):
    with torch.no_grad():
        return forward(Pair.dense(model), batch, Gates.dense(model.num_layers))


def scaled(name):
    """A model with scaled RoPE, and the keys and tensors that say so in a GGUF file."""
    if name == "plain":
        return tiny_model("llama"), {}, {}
    if name == "linear":
        rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
        keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
        return tiny_model("llama", rope_parameters=rope), keys, {}
    if name == "yarn":
        keys = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
        keys["qwen2.rope.scaling.original_context_length"] = 32
        return tiny_model("qwen2", rope_parameters=YARN), keys, {}
    made, plain = tiny_model("llama", rope_parameters=ROPE3), tiny_model("llama")
    turns = [model.network.model.rotary_emb.inv_freq for model in (plain, made)]
    return made, {}, {FREQUENCIES: (turns[0] / turns[1]).numpy().astype(np.float32)}


@pytest.mark.parametrize("name", ["plain", "linear", "yarn", "llama3"])
def test_a_files_logits_are_those_of_its_model(tmp_path, name):
    made, keys, tensors = scaled(name)
    path = write_gguf(tmp_path / "model", made, keys=keys, tensors=tensors)  # known by its magic
    batch = random_batch(made, prompt=60, new=6)
    read = load_model(str(path), dtype="float32")
    torch.testing.assert_close(logits(read, batch), logits(made, batch), atol=1e-3, rtol=0)


def test_wide_heads_and_special_tokens_are_the_files(tmp_path):
    made = tiny_model("qwen3", tie_word_embeddings=True)
    assert made.head_dim == 16 != made.config.hidden_size // made.config.num_attention_heads
    keys = {"qwen3.attention.key_length": 16, "tokenizer.ggml.padding_token_id": 3}
    read = load_model(str(write_gguf(tmp_path / "m", made, keys=keys)), dtype="float32")
    batch = random_batch(made, prompt=60, new=6)
    torch.testing.assert_close(logits(read, batch), logits(made, batch), atol=1e-3, rtol=0)
    own = read.network.generation_config
    assert (own.bos_token_id, own.eos_token_id, own.pad_token_id) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_quantised_weights_are_the_packages_exactly(tmp_path, kind):
    made = tiny_model("llama", hidden_size=64, intermediate_size=96)
    number = gguf.GGMLQuantizationType[kind]
    read = load_model(str(write_gguf(tmp_path / "m.gguf", made, kind=number)), dtype="float32")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = made.network.get_parameter(name).detach().numpy()
    exact = gguf.quants.dequantize(gguf.quants.quantize(weight, number), number)
    assert np.array_equal(read.network.get_parameter(name).detach().numpy(), exact)


REFUSED = {
    "one of several": ({"keys": {"split.count": 2}}, "one of 2 parts"),
    "a block is missing": (
        {"leave_out": ("model.layers.2.mlp.up_proj.weight",)},
        r"lacks the weights 'model\.layers\.2\.mlp\.up_proj\.weight'",
    ),
    "a stranger's key": ({"keys": {"llama.attn_logit_softcapping": 30.0}}, "softcapping"),
    "a window": ({"keys": {"llama.attention.sliding_window": 8}}, "sliding_window"),
    "experts": ({"keys": {"llama.expert_count": 8}}, "expert_count"),
    "longrope": (
        {"keys": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 8.0}},
        "scales RoPE by 'longrope'",
    ),
    "longrope without a factor": (
        {"keys": {"llama.rope.scaling.type": "longrope"}},
        "scales RoPE by 'longrope'",
    ),
    "half a scaling": ({"keys": {"llama.rope.scaling.factor": 4.0}}, "does not say how"),
    "factors of another width": (
        {"tensors": {FREQUENCIES: np.full(6, 2, dtype=np.float32)}},
        "no set of 4 factors",
    ),
    "partial rotary": ({"keys": {"llama.attention.key_length": 16}}, "not all the same"),
    "another architecture": ({"keys": {"general.architecture": "mamba"}}, "'mamba'"),
    "odd factors": (
        {"tensors": {FREQUENCIES: np.array([1.0, 3.0, 2.0, 5.0], dtype=np.float32)}},
        "factors that are not Llama 3's",
    ),
    "another tensor": (
        {"tensors": {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}},
        "left out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_would_be_read_wrongly_is_refused(tmp_path, name):
    changes, words = REFUSED[name]
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), **changes)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(str(path), dtype="float32")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_or_lies_is_refused_before_it_is_believed(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    data = path.read_bytes()
    for size in (0, 3, 5, 20, 200, 5000, len(data) - 40):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError):
            load_model(str(path))
    counts = data[:8] + (2**62).to_bytes(8, "little") + data[16:]
    path.write_bytes(counts)
    with pytest.raises(ModelError, match="claims 4,611,686,018,427,387,904 entries"):
        read_gguf(path)


@pytest.mark.parametrize(("factor", "original", "theta"), [(8, 8192, 5e5), (32, 8192, 5e5)])
def test_llama_3s_own_parameters_come_back_from_their_factors(factor, original, theta):
    made = {"factor": float(factor), "low": 1.0, "high": 4.0, "original": original}
    found = llama3_of(llama3_factors_F(theta, 64, **made).astype(np.float32), theta, "file")
    assert found["factor"] == factor and found["original_max_position_embeddings"] == original
    assert llama3_of(np.ones(64, dtype=np.float32), theta, "file") is None
