"""The fits of the repairs as formulas: against a solution by other means, and in their limits."""

import math

import pytest
import torch

from helpers import normal
from pdtrim.repair import diagonal, kv, linear, outputs, scalar


def test_linear_finds_the_matrix_and_its_ridge_pulls_to_none():
    m, w = normal(200, 8), normal(8, 8, seed=1)
    halves = [(m[:90], m[:90] @ w), (m[90:], m[90:] @ w)]
    torch.testing.assert_close(linear.fit(halves, ridge=1e-12).float(), w)
    assert torch.equal(linear.fit(halves, ridge=math.inf), torch.eye(8, dtype=torch.float64))
    # the minimum of |m W - d|^2 + ridge c |W - 1|^2, by stacking the ridge below the data
    d, c = normal(200, 8, seed=2), float(m.double().square().sum(0).mean())
    root = math.sqrt(0.5 * c)
    stacked = torch.linalg.lstsq(
        torch.cat((m, root * torch.eye(8))).double(), torch.cat((d, root * torch.eye(8))).double()
    )
    torch.testing.assert_close(linear.fit([(m, d)], ridge=0.5), stacked.solution)
    zero = torch.zeros(5, 8)
    assert torch.equal(linear.fit([(zero, zero)], ridge=0.1), torch.eye(8, dtype=torch.float64))


def test_diagonal_is_the_linear_fit_of_each_channel():
    m, d = normal(100, 3), normal(100, 3, seed=1)
    m[:, 1] = 0
    c = float(m.double().square().sum(0).mean())
    found = diagonal.fit([(m[:30], d[:30]), (m[30:], d[30:])], ridge=0.5)
    for i in range(3):
        alone = (m[:, i] @ d[:, i] + 0.5 * c) / (m[:, i] @ m[:, i] + 0.5 * c)
        assert float(found[i, i]) == pytest.approx(float(alone), rel=1e-5)
    assert torch.equal(found, torch.diag(found.diagonal()))
    infinite = diagonal.fit([(m, d)], ridge=math.inf)
    assert torch.equal(infinite, torch.eye(3, dtype=torch.float64))
    assert float(diagonal.fit([(m, d)], ridge=1e-300)[1, 1]) == 1  # a channel never written


def test_scalar_is_the_ratio_of_mean_norms():
    s, t = normal(40, 5), normal(40, 5, seed=1)
    wanted = float(t.norm(dim=1).mean() / s.norm(dim=1).mean())
    assert scalar.fit([(s[:7], t[:7]), (s[7:], t[7:])]) == pytest.approx(wanted, rel=1e-5)
    assert scalar.fit([(torch.zeros(2, 5), t)]) == 1.0


def test_kv_finds_the_projections_and_its_ridge_pulls_to_the_old_ones():
    h, mix = normal(10, 20, 8), normal(8, 8, seed=1)
    old = {"k": normal(3, 8, seed=2), "v": normal(5, 8, seed=3)}
    found = kv.fit([(h[:3], h[:3] @ mix), (h[3:], h[3:] @ mix)], old, ridge=1e-12)
    for name, w_FE in old.items():
        torch.testing.assert_close(h @ found[name].T, h @ mix @ w_FE.T, atol=1e-4, rtol=1e-4)
    same = kv.fit([(h, h @ mix)], old, ridge=math.inf)
    assert all(torch.equal(same[name], old[name]) for name in old)
    # the minimum of w |h W'^T - g W^T|^2 + ridge c |W' - W|^2, by stacking the ridge below the data
    g, weight = normal(10, 20, 8, seed=4).double(), torch.ones(10, 20, 1, dtype=torch.float64)
    weight[:, 0] = 10
    heavy_h, heavy_g = ((weight.sqrt() * x.double()).flatten(0, 1) for x in (h, g))
    root = math.sqrt(0.5 * float(heavy_h.square().sum(0).mean()))
    w = old["k"].double()
    stacked = torch.linalg.lstsq(
        torch.cat((heavy_h, root * torch.eye(8))), torch.cat((heavy_g @ w.T, root * w.T))
    )
    found = kv.fit([(h, g.float())], old, ridge=0.5)
    torch.testing.assert_close(found["k"], stacked.solution.T.float(), atol=1e-4, rtol=1e-4)
    zero = torch.zeros(1, 5, 8)
    assert torch.equal(kv.fit([(zero, zero)], old, ridge=0.1)["v"], old["v"])


def test_outputs_finds_the_projection_its_bias_and_pulls_to_the_old_one():
    x, old, new = normal(200, 8) + 1, normal(5, 8, seed=1), normal(5, 8, seed=2)
    halves = [(x[:90], x[:90] @ new.T + 3), (x[90:], x[90:] @ new.T + 3)]
    found, bias = outputs.fit(halves, old, torch.zeros(5), ridge=1e-12)
    torch.testing.assert_close(found, new, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias, torch.full((5,), 3.0), atol=1e-3, rtol=1e-3)
    same, bias = outputs.fit(halves, old, torch.zeros(5), ridge=math.inf)
    assert torch.equal(same, old)  # the bias is not pulled: it makes up for the mean
    wanted = (x @ new.T + 3 - x @ old.T).mean(0)
    torch.testing.assert_close(bias, wanted, atol=1e-4, rtol=1e-4)
    # the minimum of |x W'^T - d|^2 + ridge c |W' - W|^2, by stacking the ridge below the data
    d, root = normal(200, 5, seed=3), math.sqrt(0.5 * float(x.square().sum(0).mean()))
    stacked = torch.linalg.lstsq(
        torch.cat((x, root * torch.eye(8))).double(), torch.cat((d, root * old.T)).double()
    )
    found, none = outputs.fit([(x, d)], old, ridge=0.5)
    assert none is None
    torch.testing.assert_close(found, stacked.solution.T.float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(outputs.fit([(x * 0, d)], old, ridge=0.1)[0], old)
