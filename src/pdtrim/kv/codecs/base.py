"""What every codec answers to.

A codec is a frozen record of its parameters and a pair of pure functions between tensors and the
bytes that cross the wire. Heads are independent of one another: encoding them together or one by
one gives the same values, so the simulator may encode a whole batch at once. The same input gives
the same bytes on a CPU and on a GPU.

Shapes: L heads (of any number of rows), T tokens of a cache, M kept ones in order, D head width, Y
layers, S bytes of room.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pdtrim.kv.kernels import alike, kernels_of, refuse
from pdtrim.records import Frozen


class CodecBase(Frozen):
    """Parameters of one codec, and where it is found: by users, menus, sweeps and kernels.

    Attributes:
        exact: decode sees every bit that prefill had.
        largest: the largest magnitude that the codec is sure to hold; here fp16's.
        variable: :meth:`nbytes` is only a bound.
        presets: how a user names it, for messages.
        kernels: the module of ``kv/kernels`` that codes it on a GPU; None where torch does.
        no_code: what is said of bytes that no encoder makes, where kernels find them.
    """

    exact: ClassVar[bool] = False
    largest: ClassVar[float] = 65504.0
    variable: ClassVar[bool] = False
    presets: ClassVar[str] = ""
    kernels: ClassVar[str | None] = None
    no_code: ClassVar[str] = ""

    name: str

    @classmethod
    def preset(cls, word: str) -> dict[str, Any] | None:
        """The parameters that a user's word stands for; None if it names another codec."""
        return {} if word == cls.model_fields["name"].default else None

    @classmethod
    def menu(cls, width: int) -> tuple[str, ...]:
        """Codecs of this kind that a byte budget may mix, for heads of a width."""
        return ()

    @classmethod
    def beside(cls, width: int) -> tuple[str, str, str] | None:
        """A fine, a mild and a coarse one to stand beside a selector; None if none is good."""
        return None

    @classmethod
    def sweep(cls, width: int) -> dict[str, str]:
        """Codecs to compare, as ``family@name`` to codec."""
        return {f"{cls.presets}@{cls.presets}": cls.presets}

    def check_width(self, width: int) -> None:
        """Refuse heads of a width that the codec does not take.

        Raises:
            PlanError: it does not; here it takes any.
        """
        del width

    @abstractmethod
    def encode(self, k_LMD: Tensor, v_LMD: Tensor) -> Tensor:
        """The bytes that travel: uint8, 1-D, contiguous, on the input's device.

        Numbers that the codec cannot hold are refused by :meth:`decode`, never clipped.
        """

    def encode_kept(self, k_LTD: Tensor, v_LTD: Tensor, kept_LM: Tensor | None) -> Tensor:
        """The bytes of the pairs ``kept_LM`` (int32 or int64) of a larger cache; None is all.

        On a GPU they go straight from the cache to the wire, where the codec has kernels. The
        cache may have any strides; all of ``kept_LM`` must be below T, which a GPU cannot check.
        """
        if kept_LM is None:
            return self.encode(k_LTD, v_LTD)
        M, D = kept_LM.shape[1], k_LTD.shape[2]
        if kernels := kernels_of(self, k_LTD.device, M, D):
            return kernels.encode(self, k_LTD, v_LTD, kept_LM)
        return self.encode(*(kept_of(x_LTD, kept_LM) for x_LTD in (k_LTD, v_LTD)))

    def encode_layers(
        self, kv: Sequence[tuple[Tensor, Tensor]], kept_YLM: Tensor | None, room_YS: Tensor
    ) -> None:
        """Encode a codec of fixed length: the kept pairs of many layers, or all, each into a row.

        Args:
            kv: each layer's keys and values ``[L, T, D]``, in caches of any strides.
            kept_YLM: as in :meth:`encode_kept`.
            room_YS: uint8; the encoding lies at the begin of its row.
        """
        assert not self.variable
        M, D = kv[0][0].shape[1] if kept_YLM is None else kept_YLM.shape[2], kv[0][0].shape[2]
        kernels = kernels_of(self, room_YS.device, M, D) if alike(kv, room_YS) else None
        if kernels:
            kernels.encode_layers(self, kv, kept_YLM, room_YS)
            return
        for layer, pair in enumerate(kv):
            data = self.encode_kept(*pair, None if kept_YLM is None else kept_YLM[layer])
            room_YS[layer, : len(data)].copy_(data)

    def decode_layers(
        self, data_YS: Tensor, kv: Sequence[tuple[Tensor, Tensor]], kept_YLM: Tensor
    ) -> None:
        """Decode what :meth:`encode_layers` made to the tokens ``kept_YLM`` of other caches.

        A codec of variable length needs rows as long as its encodings, so one at a time. What no
        encoder made is refused as :meth:`decode` does, behind what was written before.
        """
        L, M, D = *kept_YLM.shape[1:], kv[0][0].shape[2]
        dtype = kv[0][0].dtype
        kernels = None
        if not self.variable and alike(kv, data_YS):
            kernels = kernels_of(self, data_YS.device, M, D)
        if kernels:
            refuse(kernels.decode_layers(self, data_YS, kv, kept_YLM), self.no_code)
            return
        size = data_YS.shape[1] if self.variable else self.nbytes(L, M, D, dtype)
        at_L1 = torch.arange(L, device=data_YS.device)[:, None]
        for data, pair, kept_LM in zip(data_YS, kv, kept_YLM.long(), strict=True):
            for x_LTD, x_LMD in zip(pair, self.decode(data[:size], L, M, D, dtype), strict=True):
                # not scatter_: in bf16 it misses places of a view whose heads' strides overlap
                x_LTD[at_L1, kept_LM] = x_LMD

    @abstractmethod
    def decode(
        self, data: Tensor, heads: int, tokens: int, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[L, M, D]`` of ``dtype``.

        Raises:
            WireError: the bytes do not have the length, or the content, that the shape demands.
        """

    @abstractmethod
    def nbytes(self, heads: int, tokens: int, width: int, dtype: torch.dtype) -> int:
        """Exact length of the encoding; for a codec of variable length, the most it can be."""

    def round_trip(self, k_LMD: Tensor, v_LMD: Tensor) -> tuple[Tensor, Tensor]:
        """What decode will see; the simulator's whole view of a codec."""
        L, M, D = k_LMD.shape
        return self.decode(self.encode(k_LMD, v_LMD), L, M, D, k_LMD.dtype)


def kept_of(x_LTD: Tensor, kept_LM: Tensor) -> Tensor:
    """The tokens ``kept_LM`` of each head, ``[L, M, D]``."""
    at_LM1 = kept_LM.to(torch.int64)[..., None]
    return x_LTD.gather(1, at_LM1.expand(-1, -1, x_LTD.shape[2]))
