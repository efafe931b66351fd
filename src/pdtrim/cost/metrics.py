"""What a running vLLM pair says of itself: Prometheus text of a prefill and of a decode server.

Read from files, or from loopback. A server whose requests end after one token is prefill. vLLM's
queue time of a decode server ends when the request is scheduled, which is behind the handover:
what is left of it without the handover is the queue.

vLLM (0.32) counts a request that ends before it is scheduled, such as one that is refused, as
scheduled at 0 on the machine's clock: hours are taken from the queue's time and given to
prefill's. Their sum is right. So of a decode server only the sum is read, and its first step taken
to last as long as a later one; of a prefill server whose queue time is below 0, all of it counts as
prefill's.
"""

from __future__ import annotations

import ipaddress
import math
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pdtrim.errors import PdtrimError, border
from pdtrim.reading.json_text import read_bytes

MAX_BYTES = 32 * 2**20
TIMEOUT_S = 10
QUEUE, PREFILL, DECODE = (
    f"vllm:request_{part}_time_seconds" for part in ("queue", "prefill", "decode")
)
PROMPT, ANSWER = "vllm:request_prompt_tokens", "vllm:request_generation_tokens"
OWN, XFER = "pdtrim:handover_seconds", "vllm:nixl_xfer_time_seconds"
"""NIXL's transfer time counts from before it posts: its post time is a part of it."""
BYTES = "vllm:nixl_bytes_transferred"


@dataclass(frozen=True, kw_only=True)
class Server:
    """Sums and counts of one server's histograms, over all its label sets."""

    source: str
    sums: dict[str, float]
    counts: dict[str, float]
    model: str | None = None

    def mean(self, name: str) -> float | None:
        """Of a histogram; None if it has seen nothing."""
        count = self.counts.get(name, 0.0)
        return self.sums[name] / count if count > 0 and name in self.sums else None

    @property
    def is_prefill(self) -> bool:
        """Whether its requests end after one token."""
        answer = self.mean(ANSWER)
        return answer is not None and answer <= 1


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Means of one request, in seconds, tokens and bytes.

    Attributes:
        sent_bytes: None if no transfer was counted.
    """

    queue_s: float
    prefill_s: float
    handover_s: float
    decode_s: float
    prompt: float
    answer: float
    sent_bytes: float | None
    model: str | None
    source: str


def read_servers(places: Sequence[str]) -> Seen:
    """The means of a pair's requests.

    Args:
        places: files or loopback URLs, each of one server.

    Raises:
        PdtrimError: unreadable, no Prometheus text, no loopback, or not of a pair that has served.
    """
    servers = [parse(_text(place), place) for place in places]
    prefill = [server for server in servers if server.is_prefill]
    decode = [server for server in servers if not server.is_prefill and server.mean(ANSWER)]
    if not prefill or not decode:
        missing = "prefill" if not prefill else "decode"
        raise PdtrimError(
            f"no {missing} server that has served among {', '.join(places)}: give --metrics for"
            " each server of the pair, after some requests"
        )
    handover = _mean(decode, OWN)
    if handover is None:
        handover = _mean(decode, XFER)
    if handover is None:
        raise PdtrimError(
            f"no handover is counted among {', '.join(places)}: neither {OWN} nor {XFER} has a"
            " count"
        )
    answer, steps = _need(decode, ANSWER), _need(decode, DECODE)
    step = steps / (answer - 1) if answer > 1 else 0.0
    waited = _need(decode, QUEUE) + _need(decode, PREFILL) - step
    queue = max(0.0, _need(prefill, QUEUE))
    return Seen(
        queue_s=queue + max(0.0, waited - handover),
        prefill_s=_need(prefill, QUEUE) + _need(prefill, PREFILL) - queue,
        handover_s=handover,
        decode_s=steps + step,
        prompt=_need(prefill, PROMPT),
        answer=answer,
        sent_bytes=_mean(decode, BYTES),
        model=next((server.model for server in servers if server.model), None),
        source=", ".join(places),
    )


def _mean(servers: Iterable[Server], name: str) -> float | None:
    having = [server for server in servers if server.mean(name) is not None]
    count = sum(server.counts[name] for server in having)
    return sum(server.sums[name] for server in having) / count if having else None


def _need(servers: list[Server], name: str) -> float:
    found = _mean(servers, name)
    if found is None:
        raise PdtrimError(f"{', '.join(server.source for server in servers)}: {name} has no count")
    return found


def parse(text: str, source: str) -> Server:
    """Sums and counts of a Prometheus text.

    Raises:
        PdtrimError: the parser is not installed, or it is no such text.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise PdtrimError(
            "reading metrics needs prometheus-client: pip install 'pdtrim[metrics]'"
        ) from None
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    model: str | None = None
    with border(PdtrimError, f"{source} is no Prometheus text"):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not math.isfinite(sample.value):
                    continue
                for ending, into in (("_sum", sums), ("_count", counts)):
                    if sample.name == family.name + ending:
                        into[family.name] = into.get(family.name, 0.0) + sample.value
                model = model or sample.labels.get("model_name")
    if not counts:
        raise PdtrimError(f"{source} has no metrics of vLLM: give a server's /metrics")
    return Server(source=source, sums=sums, counts=counts, model=model)


def _text(place: str) -> str:
    data = fetch(place) if "://" in place else read_bytes(place, limit=MAX_BYTES)
    with border(PdtrimError, f"{place} is no Prometheus text"):
        return data.decode("utf-8")


class _Stay(urllib.request.HTTPRedirectHandler):
    """No server sends us elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Refuse."""


def fetch(url: str) -> bytes:
    """What a server on loopback answers.

    Raises:
        PdtrimError: no loopback, no answer, or more than :data:`MAX_BYTES`.
    """
    with border(PdtrimError, f"cannot read {url}"):
        parts = urlsplit(url)
        if parts.scheme != "http" or not _is_loopback(parts.hostname or ""):
            raise PdtrimError(
                f"{url} is not http on loopback: save it to a file, and give --metrics FILE"
            )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay)
        with direct.open(url, timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise PdtrimError(f"{url} answers more than {MAX_BYTES:,} bytes")
    return data


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
