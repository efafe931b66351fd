"""The linear gate: fitting, packing, keeping."""

from __future__ import annotations

import base64
import math
from itertools import product

import pytest
import torch
from pydantic import ValidationError

from fake_view import SCALE, B, D, E, G, H, R, fake_view
from pdtrim.errors import PlanError
from pdtrim.kv.selectors import (
    LinearGate,
)
from pdtrim.kv.selectors.gate import (
    attention_received,
    fit_gate,
    gate_score,
    pack_weights,
    threshold_for,
)


def test_fit_gate_recovers_a_planted_map() -> None:
    draw = torch.Generator().manual_seed(9)
    h_SE = torch.randn(200, E, generator=draw, dtype=torch.float64) + 3
    planted_GF = torch.randn(G, E + 1, generator=draw, dtype=torch.float64)
    target_SG = h_SE @ planted_GF[:, :-1].mT + planted_GF[:, -1]
    torch.testing.assert_close(fit_gate(h_SE, target_SG, 1e-9), planted_GF)


def test_fit_gate_is_least_squares_then_ridge() -> None:
    draw = torch.Generator().manual_seed(10)
    h_SE = torch.randn(60, E, generator=draw, dtype=torch.float64) + 1
    target_SG = torch.randn(60, G, generator=draw, dtype=torch.float64) + 5
    wide_SF = torch.cat((h_SE, torch.ones(60, 1, dtype=torch.float64)), dim=1)
    exact_GF = torch.linalg.lstsq(wide_SF, target_SG).solution.mT
    torch.testing.assert_close(fit_gate(h_SE, target_SG, 1e-10), exact_GF)

    # the penalised problem as plain least squares: a row of sqrt(ridge) a weight, none for the bias
    ridge = 30.0
    rows_EF = math.sqrt(ridge) * torch.eye(E, E + 1, dtype=torch.float64)
    stacked = torch.cat((wide_SF, rows_EF)), torch.cat((target_SG, target_SG.new_zeros(E, G)))
    ridge_GF = torch.linalg.lstsq(*stacked).solution.mT
    torch.testing.assert_close(fit_gate(h_SE, target_SG, ridge), ridge_GF)
    flat_GF = fit_gate(h_SE, target_SG, 1e12)
    torch.testing.assert_close(flat_GF[:, -1], target_SG.mean(0))


def test_gate_keeps_what_reaches_the_threshold() -> None:
    view = fake_view(40, seed=11)
    weight_GF = torch.randn(G, E + 1, generator=torch.Generator().manual_seed(12)).half()
    scores = torch.empty(B, G, 40)
    for row, head, n in product(range(B), range(G), range(40)):
        dot = sum(
            float(w * x)
            for w, x in zip(weight_GF[head, :-1].float(), view.h_BNE[row, n], strict=True)
        )
        scores[row, head, n] = dot + float(weight_GF[head, -1])
    torch.testing.assert_close(gate_score(view.h_BNE, weight_GF), scores)
    threshold = threshold_for(scores, 0.25) - 1e-4
    gate = LinearGate(weights=pack_weights(weight_GF), threshold=threshold, first=2, last=3)
    want_BGN = scores >= threshold
    assert int(want_BGN.sum()) == scores.numel() // 4
    want_BGN[..., :2] = want_BGN[..., -3:] = True
    assert torch.equal(gate.keep(view), want_BGN)


def test_threshold_for_is_the_quantile() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0], [2.0, 3.0, 0.0]])
    for keep, threshold in ((1.0, 0.0), (0.5, 3.0), (0.4, 3.0), (0.01, 5.0)):
        assert threshold_for(scores, keep) == threshold


def test_attention_received_by_hand() -> None:
    view = fake_view(9, seed=13)
    q_BHCD = torch.randn(B, H, 5, D, generator=torch.Generator().manual_seed(14))
    got_BGN = attention_received(q_BHCD, view.k_BGND, SCALE)
    for row, group, n in product(range(B), range(G), range(9)):
        best = 0.0
        for head, c in product((group * R, group * R + 1), range(5)):
            dots = [SCALE * float(q_BHCD[row, head, c] @ key) for key in view.k_BGND[row, group]]
            best = max(best, math.exp(dots[n]) / sum(math.exp(dot) for dot in dots))
        assert float(got_BGN[row, group, n]) == pytest.approx(math.log(best), abs=1e-5)


def test_gate_refuses_unreadable_weights() -> None:
    nan = base64.b64encode(b"\x00\x7e" * 4).decode()
    for weights, problem in (
        ("", "at least 1"),
        ("not base64!", "not base64"),
        ("bGc=bGc=", "not base64"),
        ("\u00e9", "not base64"),
        (base64.b64encode(b"abc").decode(), "whole number"),
        (nan, "not finite"),
    ):
        with pytest.raises(ValidationError, match=problem):
            LinearGate(weights=weights, threshold=0)
    with pytest.raises(PlanError, match="float16"):
        pack_weights(torch.full((G, E + 1), 1e6))
    for shape in ((G, E), (G + 1, E + 1), (1, E + 1)):
        gate = LinearGate(weights=pack_weights(torch.zeros(shape)), threshold=0)
        for tokens in (0, 8):
            with pytest.raises(PlanError, match="2x17"):
                gate.keep(fake_view(tokens))


def test_weights_are_little_endian_halves() -> None:
    assert base64.b64decode(pack_weights(torch.tensor([[1.0, -2.0]]))) == b"\x00\x3c\x00\xc0"
