"""Narrower blocks for the tests, and what they must compute, from whole models."""

import copy

import torch

from helpers import make_plan, tiny_model, with_files
from pdtrim.models.model import Model
from pdtrim.plan import Gates, PrunePlan, Width, Widths

L, G, R, F = 4, 4, 2, 48  # layers, KV heads, query heads a KV head, neurons
BIASES = ("self_attn.o_proj.bias", "mlp.down_proj.bias")


def grouped(family, **changes):
    """A tiny model with enough KV heads to lose some; its head width is 8, and it has no window."""
    if family == "phi3":
        changes = {"sliding_window": None, **changes}
    heads = {"num_attention_heads": G * R, "num_key_value_heads": G, "head_dim": 8}
    return tiny_model(family, layers=L, hidden_size=G * R * 8, **heads, **changes)


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
    made = plan.model_copy(update={"widths": given or widths()})
    return with_files(made, blocks, folder) if blocks else PrunePlan.from_json(made.to_json())


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
