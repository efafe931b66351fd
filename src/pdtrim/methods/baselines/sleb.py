"""``sleb``: iterative removal by NLL (SLEB, arXiv 2402.09025).

With R the blocks removed so far, again and again::

    j* = argmin_{j not in R, j not protected} NLL(model without R and j),     R <- R + {j*}

until as many are gone as asked. The first and the last block are protected, as in the authors'
code; ``protect_first`` and ``protect_last`` change that. Results are nested: that for k + 1 blocks
holds that for k.

The authors' code reads WikiText-2, of which its loader leaves about 5 sequences of 2048 tokens.
Different here: the text is the user's, and the NLL is that of continuation tokens (``nll.py``). A
candidate is run from the first layer where it differs from the state before, which gives the same
losses for about half of the block-tokens.

In mode ``subset`` prefill loses the blocks that went first. In mode ``projected`` decode's blocks
go first, then prefill's with decode's gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.methods.baselines.base import PaperCalibration
from pdtrim.methods.baselines.iterative import Iterative
from pdtrim.methods.baselines.orders import open_blocks
from pdtrim.methods.problem import Problem


@dataclass(frozen=True, kw_only=True)
class SLEB(Iterative):
    """Settings: how many blocks at each end stay."""

    name = "sleb"
    paper_calibration = PaperCalibration(source="WikiText-2 train", sequences=5, tokens=2048)
    protect_first: int = 1
    protect_last: int = 1

    def allowed(self, problem: Problem) -> range:
        """All but the protected blocks."""
        return open_blocks(self.name, problem, self.protect_first, self.protect_last)
