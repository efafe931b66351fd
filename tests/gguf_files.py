"""GGUF files of tiny random models, written as llama.cpp's converter does."""

import gguf
import numpy as np
from tokenizers import pre_tokenizers

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def write_gguf(path, model, *, keys=None, tensors=None, leave_out=(), kind=None):
    """A model as a GGUF file; more keys and tensors may be added, tensors left out or quantised."""
    config = model.config
    arch = "llama" if config.model_type in ("llama", "mistral") else config.model_type
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_vocab_size(config.vocab_size)
    words = [*ALPHABET[: config.vocab_size - 1], "!#"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["! #"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (keys or {}).items():
        add = {float: writer.add_float32, str: writer.add_string, int: writer.add_uint32}
        add[type(value)](key, value)
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in model.network.state_dict().items():
        if name in leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        base, leaf = name.rsplit(".", 1)
        array = weight.float().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows = array.shape[0] // heads // 2
            array = array.reshape(heads, 2, rows, *array.shape[1:]).swapaxes(1, 2)
            array = array.reshape(weight.shape)
        place = f"{names.get_name(base)}.{leaf}"
        if kind is not None and array.ndim == 2:
            writer.add_tensor(place, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, np.ascontiguousarray(array))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
