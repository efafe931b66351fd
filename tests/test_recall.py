"""Recall: rows that need their prompt, what they cost, and a search that weighs it."""

import pytest
import torch
import torch.nn.functional as F

from helpers import random_batch, random_text, tiny_model, trimmed
from pdtrim.calibration.recall import ALL, FEW, answer_loss, recall_text
from pdtrim.errors import CalibrationError, PlanError
from pdtrim.evaluate.sensitivity import WAYS, recall_sensitivity
from pdtrim.methods import PDTrim, Target
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates
from pdtrim.repair.held_out import HeldOut
from pdtrim.report.inspect import picture
from pdtrim.search.objective import Objective
from pdtrim.search.state import Removal
from pdtrim.stage.forward import Batch, Pair, forward


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=5, vocab_size=900)


def text_of(model, rows=6, seed=1):
    return random_batch(model, rows=rows, prompt=80, new=40, seed=seed)


def nll_of(model, recall, gates):
    """The answers' NLL by row, from whole logits and a loop."""
    with torch.no_grad():
        logp = F.log_softmax(forward(Pair.dense(model), recall.batch, gates), -1)
    found = []
    for row, answers in enumerate(recall.answer_BC.tolist()):
        at = [i for i, on in enumerate(answers) if on]
        nll = [-float(logp[row, i, recall.batch.continuation_BC[row, i]]) for i in at]
        found.append(sum(nll) / len(nll))
    return torch.tensor(found)


@pytest.mark.parametrize("rows", [FEW, ALL])
def test_answers_stand_in_the_prompt_and_rows_lie_by_sequence(model, rows):
    text = text_of(model)
    recall, each = recall_text(model, text, rows=rows), rows.count
    assert len(recall) == 6 and len(recall.batch) == 6 * each
    columns = zip(
        recall.batch.prompt_BP.tolist(),
        recall.batch.continuation_BC.tolist(),
        recall.answer_BC.tolist(),
        strict=True,
    )
    whole = torch.cat((text.prompt_BP, text.continuation_BC), 1).tolist()
    for number, (prompt, continuation, answers) in enumerate(columns):
        assert any(answers)
        for token, on in zip(continuation, answers, strict=True):
            assert not on or token in prompt
        assert set(prompt) <= set(whole[number // each])
    again = recall_text(model, text, rows=rows)
    assert torch.equal(again.batch.prompt_BP, recall.batch.prompt_BP)
    part = recall[2:4]
    assert torch.equal(part.batch.prompt_BP, recall.batch.prompt_BP[2 * each : 4 * each])
    assert torch.equal(part.answer_BC, recall.answer_BC[2 * each : 4 * each])


def test_words_that_return_and_pairs_and_questions_come_from_a_text(tiny_folder):
    model = load_model(str(tiny_folder), dtype="float32")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(model.tokenizer), (6, 120), generator=draw)
    recall = recall_text(model, Batch(prompt_BP=ids[:, :80], continuation_BC=ids[:, 80:]))
    assert recall.answer_BC.any(1).all()


def test_the_loss_is_the_mean_nll_of_each_rows_answers(model):
    recall = recall_text(model, text_of(model))
    gates = Gates.removing(5, prefill={2})
    y = trimmed(model, gates).last_stream(recall.batch)
    wanted = nll_of(model, recall, gates)
    torch.testing.assert_close(answer_loss(model, recall, y), wanted, atol=1e-4, rtol=1e-4)


def test_what_some_answers_gain_does_not_make_up_for_what_others_lose(model):
    recall = recall_text(model, text_of(model, rows=2))
    nll_B, dense_B = torch.ones(2 * FEW.count), torch.ones(2 * FEW.count)
    nll_B[0], nll_B[1] = 3.0, 0.0
    assert recall.lost(nll_B, dense_B).tolist() == [pytest.approx(2 / FEW.count), 0.0]


def test_a_judge_goes_by_all_rows(model):
    text, gates = text_of(model, rows=9), Gates.removing(5, prefill={2})  # two parts
    recall = recall_text(model, text, rows=ALL)
    gone = nll_of(model, recall, gates) - nll_of(model, recall, Gates.dense(5))
    found = HeldOut(model, text, weight=0.5).score(trimmed(model, gates)).recall
    assert found == pytest.approx(float(gone.clamp_min(0).mean()), abs=1e-4)


def test_an_objective_adds_what_recall_lost_and_resumes_it(model):
    text = text_of(model)
    dense = Removal(num_layers=5, mode="projected")
    states = [dense.remove("prefill", i) for i in (1, 2, 3)]
    plain, weighed = Objective(model, text), Objective(model, text, recall=0.5)
    start = weighed.measure(dense)
    assert start.loss == pytest.approx(0, abs=1e-5)
    weighed.stand_on(start)
    recall = recall_text(model, text)
    for state in states:
        more = nll_of(model, recall, state.gates) - nll_of(model, recall, Gates.dense(5))
        gone = more.clamp_min(0)
        kl, loss = plain.measure(state).loss, weighed.measure(state).loss
        assert loss == pytest.approx(kl + 0.5 * float(gone.mean()), abs=1e-4)
        score = weighed.score_of(state)
        assert score.kl == pytest.approx(kl, abs=1e-5) and score.loss == pytest.approx(loss)
        assert score.recall == pytest.approx(float(gone.mean()), abs=1e-4)
    assert weighed.dense_cost > plain.dense_cost, "the meter counts the rows of recall"
    few = weighed.score(states[0].remove("prefill", 3), 1)
    both = weighed.score(states[0].remove("prefill", 3))
    assert torch.equal(both[: len(few)], few)


def test_a_plan_reports_both_and_its_weight_decides(model):
    text = random_text(model, prompt=80, new=40)
    made = {}
    for weight in (0.0, 50.0):
        target = Target(prefill_remove=2, recall=weight, search="one_shot", repair="none")
        plan = PDTrim().plan(model, text, target).plan
        made[weight] = plan.provenance
        judge = HeldOut(model, text.rerank, weight=0.0)
        score = judge.score(trimmed(model, plan.gates))
        assert plan.provenance.held_out.kl == pytest.approx(score.kl, abs=1e-5)
        assert plan.provenance.held_out.recall == pytest.approx(score.recall, abs=1e-5)
        assert "nats an answer" in str(picture(plan).renderables[0])
    assert made[0.0].search_recall is None and made[50.0].recall_weight == 50.0
    objective = Objective(model, text.search, recall=1.0)
    dense = Removal(num_layers=5, mode="projected")
    for i in range(4):
        objective.measure(dense.remove("prefill", i))
    lost = {i: objective.score_of(dense.remove("prefill", i)).recall for i in range(4)}
    first = min(lost, key=lost.get)  # alone, as one-shot ranks them; the last block costs nothing
    target = Target(prefill_remove=2, recall=1e4, search="one_shot", repair="none")
    gates = PDTrim().plan(model, text, target).plan.gates
    assert gates.prefill_attention[first] == "kv" or lost[first] >= 0


def test_sensitivity_of_recall_is_that_of_whole_runs(model):
    text = text_of(model)
    recall_WL = recall_sensitivity(model, text)
    recall = recall_text(model, text)
    for way, layer in ((0, 2), (1, 1), (2, 3)):
        gates = list(WAYS.values())[way](5, layer)
        more = nll_of(model, recall, gates) - nll_of(model, recall, Gates.dense(5))
        gone = more.clamp_min(0)
        assert float(recall_WL[way, layer]) == pytest.approx(float(gone.mean()), abs=1e-3)


def test_short_text_and_strange_weights_are_refused(model):
    short = random_batch(model, rows=2, prompt=8, new=4)
    with pytest.raises(CalibrationError, match="recall weight of 0"):
        recall_text(model, short)
    for target in (
        Target(recall=-1.0),
        Target(minutes=0),
        Target(minutes=float("nan")),
        Target(minutes=1, budget=5),
    ):
        with pytest.raises(PlanError, match=r"at least 0|more than 0|either minutes"):
            target.check(model)
