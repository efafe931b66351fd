"""Keys and values that a codec cannot hold are refused before they are coded, never clipped."""

from __future__ import annotations

import math

import torch

from pdtrim.errors import NotFinite
from pdtrim.kv.codecs.base import CodecBase
from pdtrim.kv.groups import HeadGroup


def check_bearable(layer: int, codec: CodecBase, group: HeadGroup) -> None:
    """Refuse pairs that are no numbers, or beyond the largest that the codec holds.

    Raises:
        NotFinite: there are some; the message names the layer.
    """
    if not group.k_BgMD.numel():
        return
    kv = {"key": group.k_BgMD, "value": group.v_BgMD}
    ends = torch.stack([end.float() for x in kv.values() for end in torch.aminmax(x)]).view(2, 2)
    for what, (low, high) in zip(kv, ends.tolist(), strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFinite(
                f"layer {layer}: prefill made a {what} that is NaN or infinite: the model does not"
                " bear this prompt in its dtype"
            )
        if max(-low, high) > codec.largest:
            raise NotFinite(
                f"layer {layer}: prefill made a {what} of {max(-low, high):.3g}, and the codec"
                f" '{codec.name}' ends at {codec.largest:.0f}: plan with a raw or lossless codec"
            )
