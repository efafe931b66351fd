"""The real model: the simulator, the processes and the demo's whole path on SmolLM2-135M."""

import json

import pytest
import torch

from helpers import export, first_last, make_plan
from pdtrim.demo import ROWS, run_demo
from pdtrim.errors import PlanError
from pdtrim.evaluate.kv_probe import check_codecs
from pdtrim.evaluate.result import Result
from pdtrim.exported import load_pair
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.methods import PDTrim, Target
from pdtrim.plan import Gates, LayerKV
from pdtrim.runtime.session import Session
from pdtrim.search.anneal import Annealing
from pdtrim.stage.cost import Lengths
from pdtrim.stage.forward import Batch, Pair, forward

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_stages")]

TEXT = (
    "The history of the lighthouse begins in antiquity. Before the development of clearly defined"
    " ports, mariners were guided by fires built on hilltops. Since raising the fire would improve"
    " the visibility, placing the fire on a platform became a practice that led to the development"
    " of the lighthouse. In antiquity, the lighthouse functioned more as an entrance marker to"
    " ports than as a warning signal for reefs and promontories, unlike many modern lighthouses."
)


@pytest.fixture(scope="module")
def batch(smollm2):
    ids = torch.tensor([smollm2.tokenizer(TEXT).input_ids])
    return Batch(prompt_BP=ids[:, :50], continuation_BC=ids[:, 50:80])


def test_the_simulator_equals_transformers(smollm2, batch):
    ids = torch.cat((batch.prompt_BP, batch.continuation_BC), dim=1)
    with torch.no_grad():
        theirs = smollm2.network(ids[:, :-1]).logits[:, 49:]
        ours = forward(Pair.dense(smollm2), batch, Gates.dense(30))
    torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=1e-4)
    nll = torch.nn.functional.cross_entropy(ours[0], batch.continuation_BC[0])
    assert nll < 3.5, "a real model predicts real text"


def test_two_processes_equal_the_simulator(smollm2, batch, tmp_path):
    """Half the layers hand over a part of the prompt, half the whole."""
    gates = Gates.removing(30, prefill=range(20, 30), decode={7, 24}).without_dead_work()
    rules = tuple(first_last(4, 16) if i % 2 else LayerKV() for i in range(30))
    plan = make_plan(smollm2, gates, rules)
    folder = export(plan, smollm2, tmp_path / "pair")
    pair, _ = load_pair(folder)
    with torch.no_grad():
        simulated = forward(pair, batch, gates, HandoverPolicy.of(plan))
    with Session(folder) as session:
        torch.testing.assert_close(session.score(batch), simulated, atol=1e-4, rtol=0)
    pruned = (folder / "prefill" / "model.safetensors").stat().st_size
    assert pruned < 0.85 * (folder / "decode" / "model.safetensors").stat().st_size


def test_a_dense_pair_writes_what_transformers_generates(smollm2, tmp_path):
    folder = export(make_plan(smollm2, Gates.dense(30)), smollm2, tmp_path / "pair")
    with Session(folder) as session:
        prompt = session.encode("Explain what artificial intelligence is.")
        ours = session.generate([prompt], max_new_tokens=24)[0].tokens
    theirs = smollm2.network.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert ours == theirs[0, len(prompt) :].tolist()


def test_the_gguf_alias_gives_the_same_model_as_its_safetensors(smollm2_folder, smollm2):
    assert smollm2_folder.with_suffix(".fingerprint").read_text() == smollm2.fingerprint


def test_a_codec_that_breaks_the_model_is_refused(smollm2):
    def plan(codec):
        return make_plan(smollm2, Gates.dense(30), (LayerKV(codec=parse_codec(codec)),) * 30)

    assert check_codecs(smollm2, plan("raw")) is None
    probed = check_codecs(smollm2, plan("int4:recent=0,rotate=true"))
    assert probed.plainly >= 4 and probed.found >= probed.plainly / 2 and probed.kl < 0.05
    with pytest.raises(PlanError, match=r"break .* finds [0-2] of 6 needles"):
        check_codecs(smollm2, plan("int2:first=0,recent=0"))


def test_the_demo_keeps_its_promise_with_a_short_search(tmp_path, monkeypatch, smollm2_folder):
    monkeypatch.setattr("pdtrim.demo.MODEL", str(smollm2_folder))
    monkeypatch.setattr("pdtrim.demo.LENGTHS", Lengths(prompt=96, continuation=48))
    paper = next(row for row in ROWS if row.name == "paper")
    short = PDTrim(shortlist=2, annealing=Annealing(steps=0), finalists=1)
    row = type(paper)(name="pdtrim", method=short, target=Target(prefill_remove=8, decode_remove=0))
    result = run_demo(tmp_path, rows=(row,))
    assert Result.load(tmp_path / "result.json") == result
    dense, pruned = result.rows
    assert pruned.prefill_blocks == 22 and pruned.decode_blocks == 30
    assert dense.kl == pytest.approx(0, abs=1e-6) and 0.005 < pruned.kl <= 0.15
    assert 0.6 < pruned.prefill_flops_ratio < 0.8 and pruned.kv_compression == 1.0
    assert "intelligence" in dense.answer and "intelligence" in pruned.answer
    held_out = [json.loads(line)["text"] for line in (tmp_path / "held-out-squad.jsonl").open()]
    assert len(held_out) == len(set(held_out)) > 50
