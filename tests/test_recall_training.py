"""Training text that needs recall, made of ordinary text."""

import pytest
import torch

from pdtrim.calibration.recall_training import NEAR, PAIR, pairs, recall_rows, returns
from pdtrim.errors import CalibrationError
from pdtrim.stage.forward import Batch

P, C = 40, 24


def text(rows=60, vocabulary=3000):
    """Mostly frequent tokens, and some that are rare; row 0's first token begins each row."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randint(10, 40, (rows, P + C), generator=draw)
    rare = torch.randint(40, vocabulary, (rows, P + C), generator=draw)
    rare[:, 30:] = rare[:, :34]  # they come back 30 tokens later
    ids = torch.where(torch.rand(rows, P + C, generator=draw) < 0.7, common, rare)
    ids[:, 0] = 1
    return Batch(prompt_BP=ids[:, :P], continuation_BC=ids[:, P:])


def drawn():
    return torch.Generator().manual_seed(3)


def test_a_return_begins_with_a_rare_token_of_the_far_prompt():
    rows_nW = returns(text(), 10, begin=1, draw=drawn())
    assert 5 < len(rows_nW) <= 10 and rows_nW.shape[1] == P + C
    for row in rows_nW.tolist():
        assert row[0] == 1 and row[P] >= 40
        assert row[P] in row[1 : P - NEAR] and row[P] not in row[P - NEAR : P]


def test_pairs_come_again_in_another_order():
    rows_nW = pairs(text(), 5, begin=1, draw=drawn())
    in_order = 0
    for row in rows_nW.tolist():
        assert row[0] == 1
        listed = [tuple(row[i : i + PAIR]) for i in range(P - P // PAIR * PAIR + PAIR, P, PAIR)]
        again = [tuple(row[i : i + PAIR]) for i in range(P, P + C, PAIR)]
        assert len(set(again)) == C // PAIR and set(again) <= {*listed, tuple(row[8:16])}
        in_order += again == listed[: len(again)]
    assert in_order < 2


def test_recall_rows_are_as_many_as_asked_and_a_seeds_own():
    ordinary = text()
    one, same, other = (recall_rows(ordinary, 20, begin=1, seed=seed) for seed in (0, 0, 1))
    assert (
        len(one) == 20 and one.prompt_BP.shape == (20, P) and one.continuation_BC.shape == (20, C)
    )
    assert torch.equal(one.prompt_BP, same.prompt_BP)
    assert not torch.equal(one.prompt_BP, other.prompt_BP)
    copied = [
        row
        for row, rest in zip(one.prompt_BP.tolist(), one.continuation_BC.tolist(), strict=True)
        if str(rest)[1:-1] in str(row)
    ]
    assert len(copied) >= 6  # a third, in one piece each
    with pytest.raises(CalibrationError, match="prompts of 17 tokens at least, not 16"):
        short = Batch(
            prompt_BP=ordinary.prompt_BP[:, :16], continuation_BC=ordinary.continuation_BC
        )
        recall_rows(short, 3, begin=1)
