"""What ``pdtrim serve`` says of a pair and of this machine before it serves: lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdtrim.bench.rounds import SLOW
from pdtrim.bench.start import REPEATS, Measured, Read, dense_sizes
from pdtrim.engines.pages import page_bytes, pages_of
from pdtrim.models.loading import dtype_named
from pdtrim.plan import PrunePlan


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing to know, and how it came about."""

    text: str
    how: str


def start_lines(plan: PrunePlan, measured: Measured) -> list[Line]:
    """Of a plan and of what was measured for it: what is saved, then warnings."""
    return [*_saved(plan, measured), *_warnings(measured)]


def _saved(plan: PrunePlan, measured: Measured) -> Iterator[Line]:
    dense, read, coded = measured.dense, measured.read, measured.coded
    layers = plan.model.num_layers
    yield Line(
        text=f"stages: prefill runs {plan.gates.blocks('prefill')} of {layers} blocks whole, decode"
        f" {plan.gates.blocks('decode')}",
        how="the plan's gates: blocks whose attention and MLP both run",
    )
    yield Line(
        text=f"handover{_share(measured)}: of {measured.tokens:,} tokens {_size(read.nbytes)} in"
        f" {_count(read.pieces, 'read')}, the dense model's {_size(dense.nbytes)} in"
        f" {dense.pieces:,}: compression {dense.nbytes / read.nbytes:.3g}x",
        how=f"pages of {measured.block_size} tokens in {measured.dtype}, by the plan, against those"
        f" of all {layers} layers" + (", and the codecs' bytes of random keys" if coded else ""),
    )
    yield Line(
        text=f"link: {_speed(dense)}; {_ms(read.seconds)}, the dense model's {_ms(dense.seconds)}",
        how=f"NIXL reads of so many bytes in so many descriptors, from a process on"
        f" {measured.devices[0]} into one on {measured.devices[1]}"
        f"{f' ({measured.hardware})' if measured.hardware else ''}, median of {REPEATS}",
    )
    if coded:
        speeds = (coded.raw_bytes / taken / 1e9 for taken in (coded.encode_s, coded.decode_s))
        yield Line(
            text="codecs: {} GB/s of raw bytes in, {} out; {} and {}".format(
                *(f"{speed:.3g}" for speed in speeds), _ms(coded.encode_s), _ms(coded.decode_s)
            ),
            how="all layers of the prompt through the plan's codecs on random keys and values,"
            f" median of {REPEATS}",
        )
    yield Line(
        text=f"in turn: {_ms(measured.seconds)}, {dense.seconds / measured.seconds:.3g}x as fast as"
        " the dense model's",
        how="encoding, reading and decoding one after the other on idle devices, with no handshake"
        " and no engine",
    )
    dtype = dtype_named(measured.dtype)
    token = sum(page_bytes(plan, layer, 1, dtype.itemsize) for layer in plan.sent_layers)
    dense_token = dense_sizes(plan, 1).raw_bytes(dtype)
    yield Line(
        text=f"memory: a token takes {token:,} bytes of decode's cache, the dense model's"
        f" {dense_token:,}; {_holes(plan, measured)}",
        how=f"keys and values of the {len(plan.sent_layers)} layers that decode reads; dropped"
        " pages take none",
    )


def _share(measured: Measured) -> str:
    return f" of each of {measured.ranks} GPUs" if measured.ranks > 1 else ""


def _holes(plan: PrunePlan, measured: Measured) -> str:
    whole = len(plan.sent_layers) * pages_of(measured.tokens, measured.block_size)
    return f"the prompt holds {measured.pages.pieces:,} of {whole:,} pages there"


def _warnings(measured: Measured) -> Iterator[Line]:
    dense, coded = measured.dense, measured.coded
    speed = dense.nbytes / dense.seconds / 1e9
    if measured.devices[1].startswith("cuda") and speed < SLOW * measured.copy_gb_s:
        yield Line(
            text=f"warning: NIXL reads {speed:.2g} GB/s where a copy makes"
            f" {measured.copy_gb_s:.2g}: UCX emulates the READ in software, or has no direct way"
            " between the two GPUs",
            how=f"a READ below {SLOW:g} of a plain copy of the same bytes on decode's GPU",
        )
    if coded and coded.unaided:
        yield Line(
            text=f"warning: {', '.join(coded.unaided)} runs in torch on this GPU, not in a kernel",
            how="no Triton here, or heads that the kernels do not take",
        )
    if coded and measured.seconds > measured.pages.seconds:
        yield Line(
            text="warning: on this link the codecs cost more than they save: without them"
            f" {_ms(measured.pages.seconds)}",
            how="the same pages read without a codec",
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.4g} MB"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _speed(read: Read) -> str:
    return f"{read.nbytes / read.seconds / 1e9:.3g} GB/s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
