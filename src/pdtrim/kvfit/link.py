"""From what a user knows of the link to a KV policy: a compression, bytes a token, or a time.

A prompt's layers are handed over as prefill makes them: one is encoded, sent and decoded while the
next ones are computed. What decode waits for, the *exposed* time, is the last layer's way and what
the slowest of the three has not caught up with by then. For L layers that take p seconds of prefill
each, e to encode, m to move and d to decode it is ``e + m + d + (L - 1) max(0, max(e, m, d) - p)``.
So codes pay where that is less than the plain cache's, for which only m counts. Where the link's
speed is known, codecs that do not pay at the speeds measured on this machine are left out, and
where none does, or the wanted time is met without compression, the plain cache is sent.

Without overlap, sending B bytes over a link of s bytes a second takes B / s. Encoding them at rate
c (encode and decode in sequence) to B / x pays while ``B / c + B / (x s) < B / s``, that is for
links slower than ``s* = (1 - 1 / x) c`` (KVServe, 2605.13734): :func:`break_even`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pdtrim.errors import PlanError
from pdtrim.kvfit.budget import KVBudget
from pdtrim.kvfit.menu import Codecs
from pdtrim.kvfit.policy import KVPolicy
from pdtrim.kvfit.request import KVRequest
from pdtrim.kvfit.sizes import full_bytes
from pdtrim.models.model import Model

FULL = KVRequest.parse("full")


@dataclass(frozen=True, kw_only=True)
class CodecSpeed:
    """Raw gigabytes a second through encoding and through decoding, a layer at a time."""

    encode_gb_s: float
    decode_gb_s: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was measured here.

    Attributes:
        codecs: by the codecs that a budget may use.
        layer_s: seconds that prefill takes for a layer of the calibration prompt.
    """

    codecs: Mapping[Codecs, CodecSpeed]
    layer_s: float


@dataclass(frozen=True, kw_only=True)
class LinkBudget:
    """At most one of a compression, bytes a prompt token, or milliseconds at a link's speed."""

    compression: float | None = None
    bytes_per_token: float | None = None
    handover_ms: float | None = None
    link_gbit_s: float | None = None

    def policy(
        self,
        model: Model,
        otherwise: KVPolicy,
        prompt_tokens: int,
        *,
        machine: Machine | None = None,
    ) -> KVPolicy:
        """The KV policy it asks for: ``full``, a budget, or ``otherwise``.

        Args:
            machine: read where the link's speed is given; None takes every codec to pay.

        Raises:
            PlanError: more than one wish, one beside a policy, or a number that is not positive.
        """
        wishes = [self.compression, self.bytes_per_token, self.handover_ms]
        given = [wish for wish in wishes if wish is not None]
        for number in (*wishes, self.link_gbit_s):
            if number is not None and not 0 < number < math.inf:
                raise PlanError(f"a KV budget must be a number above 0, not {number:g}")
        if len(given) > 1:
            raise PlanError("give one of --kv-compression, --kv-bytes-per-token, --handover-ms")
        if self.handover_ms is not None and self.link_gbit_s is None:
            raise PlanError("--handover-ms needs --link-gbit-s")
        if not given:
            if self.link_gbit_s is not None:
                raise PlanError("--link-gbit-s needs one of --kv-compression and --handover-ms")
            return otherwise
        if otherwise != FULL:
            raise PlanError("give either --kv or a KV budget, not both")
        raw_bytes = full_bytes(model, prompt_tokens)
        compression = self._compression(raw_bytes, prompt_tokens)
        if compression <= 1:
            return FULL
        if compression == math.inf:  # the quotient of two numbers that are none of it
            raise PlanError("that KV budget is out of reach: give more bytes, or more time")
        codecs = self._codecs(compression, raw_bytes, model.num_layers, machine)
        return FULL if codecs is None else KVBudget(compression=compression, codecs=codecs)

    def _codecs(
        self, compression: float, raw_bytes: float, layers: int, machine: Machine | None
    ) -> Codecs | None:
        """The smallest codecs that the link repays; None if it repays none."""
        if self.link_gbit_s is None or machine is None:
            return "any"
        layer_bytes, link = raw_bytes / layers, self.link_gbit_s * 1e9 / 8
        plain = exposed(0, layer_bytes / link, 0, layers=layers, layer_s=machine.layer_s)
        for codecs in ("any", "packed"):
            speed = machine.codecs.get(codecs)
            if speed is None:
                continue
            coded = exposed(
                layer_bytes / (speed.encode_gb_s * 1e9),
                layer_bytes / compression / link,
                layer_bytes / (speed.decode_gb_s * 1e9),
                layers=layers,
                layer_s=machine.layer_s,
            )
            if coded < plain:
                return codecs
        return None

    def _compression(self, full: float, tokens: int) -> float:
        if self.compression is not None:
            if self.compression < 1:
                raise PlanError(f"KV compression {self.compression} must be at least 1")
            return self.compression
        if self.bytes_per_token is not None:
            return full / tokens / self.bytes_per_token
        assert self.handover_ms is not None and self.link_gbit_s is not None
        return full / (self.link_gbit_s * 1e9 / 8 * self.handover_ms / 1e3)


def exposed(encode: float, move: float, decode: float, *, layers: int, layer_s: float) -> float:
    """Seconds from the end of prefill until decode has every layer, all layers alike.

    Args:
        encode, move, decode: seconds of a layer; each takes one layer at a time.
        layer_s: seconds of prefill that a layer takes.
    """
    behind = max(0.0, max(encode, move, decode) - layer_s)
    return encode + move + decode + (layers - 1) * behind


def break_even(compression: float, gb_s: float) -> float:
    """Gbit/s of the link below which encoded beats raw; 0 if it never does.

    Args:
        gb_s: raw gigabytes a second through encoding and then decoding.
    """
    return max(0.0, 1 - 1 / compression) * gb_s * 8
