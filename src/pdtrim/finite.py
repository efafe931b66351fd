"""NaN and infinity, refused where they would decide something.

No comparison with NaN is true: a search would never end, a ranking would follow the order of its
candidates, and the likeliest token would be number 0. Infinity comes from an activation beyond its
dtype, and is NaN a layer later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim.errors import NotFinite

ADVICE = "weights or activations overflow: try --dtype float32, or check the model's files"


def finite(values: Tensor, what: str) -> Tensor:
    """The values.

    Args:
        what: they are, for the message.

    Raises:
        NotFinite: one of them is NaN or infinite.
    """
    if not bool(torch.isfinite(values.detach()).all()):
        raise NotFinite(f"{what} is NaN or infinite: {ADVICE}")
    return values
