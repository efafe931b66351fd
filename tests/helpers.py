"""Tiny random models, made on the fly, and the independent reference that they are held against.

Shapes: B batch, T tokens, E hidden width, H query heads, G KV heads, D head width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import Calibration
from pdtrim.kv.frame import encode_part
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.kv.selectors import FirstLast
from pdtrim.kv.wire import FrameWriter
from pdtrim.models import families
from pdtrim.models.block_files import FilesInFolder, FilesInMemory, save_blocks
from pdtrim.models.model import Model
from pdtrim.models.swap import Blocks
from pdtrim.plan import Gates, LayerKV, Provenance, PrunePlan
from pdtrim.stage.forward import Batch, Pair, Trimmed

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(family: str, *, layers: int = 4, **changes: object) -> PreTrainedConfig:
    sizes = {**SIZES, "num_hidden_layers": layers, **changes}
    if family == "llama":
        return LlamaConfig(**sizes)
    if family == "mistral":
        return MistralConfig(**{"sliding_window": 7, **sizes})
    if family == "phi3":
        return Phi3Config(**{"sliding_window": 7, **sizes})
    if family == "qwen2":
        return Qwen2Config(**{"tie_word_embeddings": True, **sizes})
    assert family == "qwen3"
    return Qwen3Config(**{"head_dim": 16, **sizes})


FAMILIES = tuple(families.FAMILIES)


def tiny_model(
    family: str = "llama", *, layers: int = 4, seed: int = 0, **changes: object
) -> Model:
    """A random model whose blocks matter: weights five times the usual initial spread."""
    torch.manual_seed(seed)
    config = tiny_config(family, layers=layers, **changes)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.dim() > 1:
                p.normal_(std=0.12)
            elif "bias" in name:
                p.normal_(std=0.3)
            else:
                p.uniform_(0.5, 1.5)
    return Model(network, name=f"tiny-{family}")


def random_batch(model: Model, *, rows: int = 2, prompt: int = 9, new: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (rows, prompt + new), generator=generator)
    return Batch(prompt_BP=ids[:, :prompt], continuation_BC=ids[:, prompt:])


def random_text(model: Model, *, rows: int = 4, prompt: int, new: int) -> Calibration:
    """Three parts that share nothing, of so many random sequences each."""
    search, rerank, fit = (
        random_batch(model, rows=rows, prompt=prompt, new=new, seed=seed) for seed in (1, 2, 3)
    )
    return Calibration(search=search, rerank=rerank, fit=fit, source="x", hash="0" * 64)


def random_gates(num_layers: int, rng: random.Random) -> Gates:
    """Any legal gate state, attention and MLP apart."""
    decode_attention = tuple(rng.random() < 0.7 for _ in range(num_layers))
    return Gates(
        prefill_attention=tuple(
            rng.choice(("full", "kv") if decodes else ("full", "kv", "off"))
            for decodes in decode_attention
        ),
        prefill_mlp=tuple(rng.random() < 0.6 for _ in range(num_layers)),
        decode_attention=decode_attention,
        decode_mlp=tuple(rng.random() < 0.7 for _ in range(num_layers)),
    )


def first_last(first: int, last: int) -> LayerKV:
    return LayerKV(selector=FirstLast(first=first, last=last))


def make_plan(
    model: Model, gates: Gates, kv: tuple[LayerKV, ...] | None = None, block_size: int = 1
) -> PrunePlan:
    return PrunePlan(
        model=model.ref,
        gates=gates,
        kv=kv or (LayerKV(),) * model.num_layers,
        block_size=block_size,
        provenance=Provenance(
            method="test",
            mode="projected",
            seed=0,
            calibration="none",
            calibration_hash="0" * 64,
            search_block_tokens=0,
        ),
    )


def trimmed(model: Model | Pair, gates: Gates, policy: HandoverPolicy | None = None) -> Trimmed:
    """A pair, or one model in both roles, under gates; everything travels if no policy is given."""
    pair = model if isinstance(model, Pair) else Pair.dense(model)
    whole = Trimmed.whole(pair, gates)
    return whole if policy is None else replace(whole, policy=policy)


def trim_of(plan: PrunePlan, folder: Path | None = None) -> TrimPlan:
    """A plan with its weights, which are in a folder if it has any."""
    return TrimPlan(plan=plan, files=FilesInFolder(folder=folder) if folder else FilesInMemory())


def export(plan: TrimPlan | PrunePlan, model: Model, folder: Path) -> Path:
    """A pair of a plan whose weights are the model's, or that brings its own."""
    trim = plan if isinstance(plan, TrimPlan) else TrimPlan(plan=plan)
    return trim.export(model, folder)


def pair_of(plan: PrunePlan, model: Model, folder: Path | None) -> Pair:
    return trim_of(plan, folder).pair(model)


def with_files(
    plan: PrunePlan,
    blocks: Blocks,
    folder: Path,
    *,
    merged: dict[tuple[str, int], tuple[int, ...]] | None = None,
) -> PrunePlan:
    """The plan with weights of its own, written below a folder."""
    trim = TrimPlan.of(plan, blocks, merged=merged)
    return save_blocks(trim.plan, trim.files, folder, "plan.blocks")


def forge(folder: Path) -> None:
    """Give an altered checkpoint the digests of what is there now, as an attacker would."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    entry = data["pdtrim"]
    for name in entry["files"]:
        entry["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    kept = {key: entry.pop(key, None) for key in ("config_sha256", "pair")}
    text = json.dumps(data, sort_keys=True)
    kept["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    entry.update(kept)
    path.write_text(json.dumps(data))


@torch.no_grad()
def reference_logits(
    model: Model, batch: Batch, gates: Gates, kept: dict[int, set[int]] | None = None
) -> Tensor:
    """Logits ``[B, C, V]`` by the one-forward identity, from transformers' own decoder layers.

    Every layer runs on all tokens with a mask; its attention and MLP residuals are then added per
    token as the gates say. It shares no code with pdtrim's stages.

    Args:
        kept: by layer, which prompt tokens decode may see; all where a layer is not named.
    """
    network = model.network
    ids = torch.cat((batch.prompt_BP, batch.continuation_BC), dim=1)[:, :-1]
    T, N = ids.shape[1], batch.prompt_BP.shape[1] - 1
    positions = torch.arange(T)[None]
    x = network.model.embed_tokens(ids)
    rope = network.model.rotary_emb(x, positions)
    is_decode = torch.arange(T) >= N
    for layer, block in enumerate(network.model.layers):
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        window = model.block(layer).window
        if window is not None:
            mask &= positions.T - positions < window
        if kept is not None and layer in kept:
            for key in range(N):
                if key not in kept[layer]:
                    mask[N:, key] = False
        bias = torch.zeros(T, T).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        h = block.input_layernorm(x)
        network.config._attn_implementation = "eager"
        added, _ = block.self_attn(hidden_states=h, position_embeddings=rope, attention_mask=bias)
        on = torch.where(
            is_decode,
            torch.tensor(gates.decode_attention[layer]),
            torch.tensor(gates.prefill_attention[layer] == "full"),
        )
        x = x + added * on[None, :, None]
        added = block.mlp(block.post_attention_layernorm(x))
        on = torch.where(
            is_decode, torch.tensor(gates.decode_mlp[layer]), torch.tensor(gates.prefill_mlp[layer])
        )
        x = x + added * on[None, :, None]
    return network.lm_head(network.model.norm(x[:, N:]))


def perturbed(model, layer, seed=0):
    """A block's parameters with some noise added."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator)
        for name, p in model.block(layer).module.named_parameters()
    }


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of a normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Killed(Exception):
    """A training that died."""


def killed_at(step):
    """A progress that dies when ``step`` steps are done."""

    @contextlib.contextmanager
    def progress(what, total):
        done = 0

        def advance(amount):
            nonlocal done
            done += amount
            if done == step:
                raise Killed

        yield advance

    return progress


def pairs(L, M, D, dtype=torch.float32, seed=0):
    """Keys with a few loud channels and an offset each, as real ones have, and plain values."""
    draw = torch.Generator().manual_seed(seed)
    loud_D = 1 + 40 * (torch.arange(D) % 7 == 3)
    k_LMD = (torch.randn(L, M, D, generator=draw) + torch.randn(L, 1, D, generator=draw)) * loud_D
    return k_LMD.to(dtype), torch.randn(L, M, D, generator=draw).to(dtype)


def words():
    """A tokenizer of 64 words."""
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def send_layers(link, layout, request, layers):
    """Write the frame of one request; returns its bytes."""
    writer = FrameWriter(link)
    (sent,) = writer.heads([layout], [request])
    return sent + sum(
        writer.part(encode_part(entry, layers[entry.layer])) for entry in layout.entries
    )


def frame_of(layout, request, layers):
    """The frame of one request as bytes."""
    seen = bytearray()
    send_layers(SimpleNamespace(sendall=seen.extend), layout, request, layers)
    return bytes(seen)
