"""Whether served text costs a pair more than the text that its plan was judged on.

One window of requests is held against a reference, the KL of held-out sequences. The claim that is
tested is "their mean is at most ``worse`` times the reference's". The reference is scaled by
``worse``, and the two are compared by a permutation test of Welch's t: the windows' and the
reference's numbers are shuffled, and the p-value is the share of shuffles whose t is as large.

If both are draws of one distribution, at ``worse`` 1, this is exact: at most a share ``a`` of
windows has a p of ``a`` or less, whatever the distribution and however few they are. Text that has
not changed, at ``worse`` above 1, is found rarer still. If only the means are equal it holds in the
limit (Janssen 1997). What it assumes is that requests are independent: a window in which one user
asks the same thing fifty times holds less than it seems to. The windows share one reference, so
that false alarms come together: a reference that is too low by chance raises them in every window.

Shapes: n requests of a window, m sequences of the reference, S shuffles.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pdtrim.errors import PdtrimError

LEAST = 20
"""Requests of a window that is tested; fewer say little of a mean."""
SHUFFLES = 9_999
CHUNK = 1 << 22  # shuffled numbers held at once

Numbers = NDArray[np.float64]


def p_value(
    kl_n: Numbers, reference_m: Numbers, *, worse: float, seed: int, shuffles: int = SHUFFLES
) -> float:
    """How well the reference explains a window: small if the window's mean KL is larger.

    Args:
        kl_n: of the window, nats a token.
        reference_m: of the reference.
        worse: how many times the reference's mean is still borne.
        seed: of the shuffles.

    Raises:
        PdtrimError: fewer than 2 of either, or some that are not finite.
    """
    window, reference = np.asarray(kl_n, float), np.asarray(reference_m, float)
    if min(len(window), len(reference)) < 2:
        raise PdtrimError("a test of drift needs 2 requests and 2 held-out sequences or more")
    joined = np.concatenate((window, reference * worse))
    if not np.isfinite(joined).all():
        raise PdtrimError("a test of drift needs finite KLs")
    n, rng = len(window), np.random.default_rng(seed)
    found = _welch(joined[None], n)[0]
    rows = max(1, CHUNK // len(joined))
    as_large = 0
    for start in range(0, shuffles, rows):
        shuffled = np.tile(joined, (min(rows, shuffles - start), 1))
        as_large += int((_welch(rng.permuted(shuffled, axis=1), n) >= found).sum())
    return (1 + as_large) / (1 + shuffles)


def _welch(rows_SN: Numbers, n: int) -> Numbers:
    """t of the first n of each row against the others, ``[S]``."""
    first, second = rows_SN[:, :n], rows_SN[:, n:]
    spread = first.var(1, ddof=1) / first.shape[1] + second.var(1, ddof=1) / second.shape[1]
    tiny = np.finfo(float).tiny
    t_S: Numbers = (first.mean(1) - second.mean(1)) / np.sqrt(np.maximum(spread, tiny))
    return t_S
