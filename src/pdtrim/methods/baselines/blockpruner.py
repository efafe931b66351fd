"""``blockpruner``: attention and MLP apart, iteratively by perplexity (arXiv 2406.10594).

Each block is two residual branches, its attention and its MLP, and each is a unit of its own. With
R the units removed so far, again and again::

    j* = argmin_{j not in R} PPL(model without R and j),     PPL = exp(mean NLL a token)

until the model is as small as asked. No unit is protected.

The paper calibrates on 256 samples of Alpaca and stops at a share of the parameters. Different
here: the text is the user's, perplexity is that of continuation tokens (``nll.py``), and a unit
counts as its share of a block's operations, as in all searches of this library with grain
``part``, which this method always has: asked for 2 blocks it removes units until they are worth 2.
As in the paper, units are ranked by perplexity alone and not by what they save, so the last one
may pass the goal.

In mode ``subset`` prefill loses the units that went first. In mode ``projected`` decode's units go
first, then prefill's with decode's gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.methods.baselines.base import PaperCalibration
from pdtrim.methods.baselines.iterative import Iterative


@dataclass(frozen=True, kw_only=True)
class BlockPruner(Iterative):
    """The method has no settings."""

    name = "blockpruner"
    grains = ("part",)
    paper_calibration = PaperCalibration(source="Alpaca", sequences=256)
