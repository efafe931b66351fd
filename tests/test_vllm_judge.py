"""What holds servers' tokens against the simulator: rounding passes, and nothing else does.

Without a server: other arithmetic and wrong servers are played by the simulator.
"""

import pytest
import torch

pytest.importorskip("vllm")

import vllm_servers
from pdtrim.exported import load_pair
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.stage.forward import Batch, forward
from vllm_servers import GATES, agree, coded_rules, in_fp32, prompt_of, tiny_pair

PROMPTS = [prompt_of(n, seed) for seed in (0, 1) for n in (84, 115, 129, 300)]


def pair_of(dtype, folder, tokenizer):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vllm_servers, "TYPE", dtype)
        return load_pair(tiny_pair(folder, tokenizer, coded_rules()))


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory, tiny_folder):
    return pair_of("bfloat16", tmp_path_factory.mktemp("bf16"), tiny_folder)


def said(pair, plan, prompt, *, gates=None, policy=None):
    """Eight greedy tokens of the simulator."""
    tokens = []
    for _ in range(8):
        batch = Batch(
            prompt_BP=torch.tensor([prompt]), continuation_BC=torch.tensor([[*tokens, 5]])
        )
        with torch.no_grad():
            made = forward(pair, batch, gates or plan.gates, policy or HandoverPolicy.of(plan))
        tokens.append(int(made[0, -1].argmax()))
    return tokens


def test_in_bf16_other_arithmetic_is_right(in_bf16):
    pair, plan = in_bf16
    other = in_fp32(pair)
    assert other is in_fp32(pair) and other.prefill.dtype == other.decode.dtype == torch.float32
    assert pair.prefill.dtype == pair.decode.dtype == torch.bfloat16
    made = [said(other, plan, prompt) for prompt in PROMPTS]
    assert made != [said(pair, plan, prompt) for prompt in PROMPTS]
    assert all(agree(in_bf16, *one) for one in zip(PROMPTS, made, strict=True))


def closed(stage, gate, layer):
    """GATES with one more closed."""
    name = f"{stage}_{gate}"
    values = list(getattr(GATES, name))
    assert values[layer]
    values[layer] = False
    return {"gates": GATES.model_copy(update={name: tuple(values)})}


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": HandoverPolicy.full(8)},
        closed("prefill", "mlp", 4),
        closed("decode", "mlp", 7),
        closed("decode", "attention", 7),
    ],
    ids=["policy", "prefill", "decode mlp", "decode attention"],
)
def test_in_bf16_a_wrong_server_is_found(in_bf16, wrong):
    made = [said(*in_bf16, prompt, **wrong) for prompt in PROMPTS]
    assert not all(agree(in_bf16, *one, tie=0.05) for one in zip(PROMPTS, made, strict=True))


def test_in_bf16_a_page_of_another_prompt_is_found(in_bf16):
    for prompt in PROMPTS:
        mixed = [*prompt_of(len(prompt), 7)[:32], *prompt[32:]]
        assert not agree(in_bf16, prompt, said(*in_bf16, mixed), tie=0.05)


def test_in_fp32_the_second_best_token_is_wrong(tmp_path, tiny_folder):
    simulated = pair, plan = pair_of("float32", tmp_path, tiny_folder)
    assert in_fp32(pair) is pair
    prompt = prompt_of(300)
    best = said(pair, plan, prompt)
    assert agree(simulated, prompt, best)
    batch = Batch(prompt_BP=torch.tensor([prompt]), continuation_BC=torch.tensor([best]))
    with torch.no_grad():
        made_CV = forward(pair, batch, plan.gates, HandoverPolicy.of(plan))[0]
    first_C, second_C = made_CV.topk(2).values.unbind(-1)
    at = int((first_C - second_C).argmin())
    nearly = [*best[:at], int(made_CV[at].topk(2).indices[1])]
    behind = float(first_C[at] - second_C[at])
    assert not agree(simulated, prompt, nearly, tie=behind * 0.99)
    assert agree(simulated, prompt, nearly, tie=behind * 1.01)
