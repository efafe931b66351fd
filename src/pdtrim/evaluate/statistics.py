"""Uncertainty of means over items, and of differences of two variants on the same items.

Variants are measured on the same sequences, and most of the spread between sequences is common to
both. A paired bootstrap resamples items and keeps each item's pair together, so that this common
part cancels; comparing two separate intervals would drown small differences in it.

Over several tasks items are resampled within each task, and the tasks' means averaged.

Shapes: n items, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdtrim.errors import PdtrimError

CHUNK = 1 << 22  # resampled items held at once
LEVEL = 0.95

Scores = Tensor | NDArray[np.generic] | Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the bounds of its confidence interval, in the unit of the scores."""

    mean: float
    low: float
    high: float


def mean_interval(
    a_n: Scores, *, seed: int, samples: int = 10_000, level: float = LEVEL
) -> Interval:
    """Percentile bootstrap interval of a mean over items.

    Args:
        a_n: one score an item, ``[n]``; booleans count as 0 and 1.
        seed: of the resampling.
        samples: bootstrap samples.
        level: the share of cases in which the interval should hold the true mean. With fewer than
            about 20 items it does so a little less often.

    Raises:
        PdtrimError: fewer than 2 items (one item shows no spread), scores that are not finite or
            not one-dimensional, no samples, or a level outside 0..1.
    """
    a_n = _scores(a_n)
    means_S = _resampled(a_n, np.random.default_rng(seed), samples)
    return _interval(float(a_n.mean()), means_S, level)


def paired_difference(a_n: Scores, b_n: Scores, *, seed: int, samples: int = 10_000) -> Interval:
    """Paired bootstrap interval of ``mean(a - b)``, item i of both being the same text.

    Arguments are as for :func:`mean_interval`. An interval that leaves out 0 is a difference that
    resampling the items does not explain.

    Raises:
        PdtrimError: as :func:`mean_interval`, or the two have different numbers of items.
    """
    return mean_interval(_difference(a_n, b_n), seed=seed, samples=samples)


def average_interval(a: Sequence[Scores], *, seed: int, samples: int = 10_000) -> Interval:
    """Bootstrap interval of the average over tasks of the tasks' means.

    Items are resampled within each task. Tasks are not: they are what was chosen, not a sample of
    what could have been, and each counts the same however many items it has.

    Args:
        a: the scores of each task, one an item; the other arguments are as for
            :func:`mean_interval`.

    Raises:
        PdtrimError: no task, or as :func:`mean_interval` for one of them.
    """
    if not a:
        raise PdtrimError("an average needs at least one task")
    rng = np.random.default_rng(seed)
    tasks = [_scores(a_n) for a_n in a]
    means_S = sum(_resampled(a_n, rng, samples) for a_n in tasks) / len(tasks)
    return _interval(float(np.mean([a_n.mean() for a_n in tasks])), np.asarray(means_S), LEVEL)


def paired_average(
    a: Sequence[Scores], b: Sequence[Scores], *, seed: int, samples: int = 10_000
) -> Interval:
    """Paired bootstrap interval of the average over tasks of ``mean(a - b)``.

    Item i of task t is the same text in both; arguments are as for :func:`average_interval`.

    Raises:
        PdtrimError: as :func:`average_interval`, or the two have other tasks or numbers of items.
    """
    if len(a) != len(b):
        raise PdtrimError(f"paired averages need the same tasks: {len(a)} and {len(b)} given")
    differences = [_difference(a_n, b_n) for a_n, b_n in zip(a, b, strict=True)]
    return average_interval(differences, seed=seed, samples=samples)


def _difference(a_n: Scores, b_n: Scores) -> NDArray[np.float64]:
    """``a - b``, item by item."""
    a_n, b_n = _scores(a_n), _scores(b_n)
    if len(a_n) != len(b_n):
        raise PdtrimError(f"paired scores need the same items: {len(a_n)} and {len(b_n)} given")
    return a_n - b_n


def _resampled(
    a_n: NDArray[np.float64], rng: np.random.Generator, samples: int
) -> NDArray[np.float64]:
    """Means of resampled items, ``[S]``."""
    if samples < 1:
        raise PdtrimError("a bootstrap needs at least 1 sample")
    n = len(a_n)
    rows = max(1, CHUNK // n)
    return np.concatenate(
        [
            a_n[rng.integers(0, n, size=(min(rows, samples - start), n))].mean(axis=1)
            for start in range(0, samples, rows)
        ]
    )


def _interval(mean: float, means_S: NDArray[np.float64], level: float) -> Interval:
    """Percentiles of resampled means."""
    if not 0.0 < level < 1.0:
        raise PdtrimError("an interval needs a level between 0 and 1")
    tail = (1.0 - level) / 2
    low, high = np.quantile(means_S, (tail, 1.0 - tail))
    return Interval(mean=mean, low=float(low), high=float(high))


def _scores(values: Scores) -> NDArray[np.float64]:
    if isinstance(values, Tensor):  # numpy does not read bf16, nor what needs a gradient
        values = values.detach().to("cpu", torch.float64).numpy()
    a_n = np.asarray(values, dtype=np.float64)
    if a_n.ndim != 1 or len(a_n) < 2:
        raise PdtrimError(f"an interval needs 2 or more scores in one row, not shape {a_n.shape}")
    if not np.isfinite(a_n).all():
        raise PdtrimError("an interval needs finite scores: some are infinite or not a number")
    return a_n
