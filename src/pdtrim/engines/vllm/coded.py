"""What the two sides of a plan with codecs share.

Prefill holds a range of a registered pool for each prompt from its admission on, and encodes into
it behind the forward that ends the prompt. The client carries a ticket (offset, length, nonce) to
decode, which reads the range in one descriptor into a pool of its own, checks it, and writes what
it decodes into its pages before the engine hears of it. The pool's address travels in NIXL's
handshake, as one more region.

In tensor parallel every rank does so with its own KV heads, in a pool of its own: prefill's ranks
at the offset that their scheduler gave, decode's from prefill's rank of the same number.

A range lives as long as the pages that vLLM keeps for the request: until it was read, its lease
ended, or it was aborted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from pdtrim.engines.ranges import Form, Ticket, pool_bytes
from pdtrim.engines.vllm.compat import KVConnectorWorkerMetadata
from pdtrim.engines.vllm.stage import Served
from pdtrim.errors import PlanError

TICKET = "pdtrim_range"  # in kv_transfer_params
PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt to encode."""

    ticket: Ticket
    pages: list[int]
    tokens: int


class Told(KVConnectorWorkerMetadata):
    """What the workers tell the scheduler of a step.

    vLLM lets a step's answers go as soon as its tokens are known. A GPU writes the ranges behind
    the tokens: whoever passes this on waits for the GPU, or decode could read what is not written.

    Attributes:
        sizes: bytes of each range that was written, by request and rank.
        refused: requests whose ranges a rank refused.
        written: a CUDA event behind the ranges; None if they are written.
    """

    def __init__(
        self, sizes: dict[str, dict[int, int]], refused: set[str], written: Any = None
    ) -> None:
        self.sizes = sizes
        self.refused = refused
        self.written = written

    def wait(self) -> None:
        """Return when the ranges are written."""
        if self.written is not None:
            self.written.synchronize()
            self.written = None

    def __reduce__(self) -> tuple[Any, ...]:
        """To the scheduler's process, by the thread that waits for a step's tokens too."""
        self.wait()
        return Told, (self.sizes, self.refused)

    def aggregate(self, other: Any) -> Told:
        """Of all ranks."""
        self.wait()
        other.wait()
        names = self.sizes.keys() | other.sizes.keys()
        sizes = {name: self.sizes.get(name, {}) | other.sizes.get(name, {}) for name in names}
        return Told(sizes, self.refused | other.refused)


def staging_bytes(vllm_config: Any, served: Served) -> int:
    """Bytes of a rank's pool, the same for its worker and its scheduler."""
    prompts = vllm_config.kv_transfer_config.get_from_extra_config("staged_prompts", PROMPTS)
    if type(prompts) is not int or prompts < 1:
        raise PlanError(f"staged_prompts {prompts} must be a number of at least 1")
    model = vllm_config.model_config
    block_size = vllm_config.cache_config.block_size
    longest, ranks = model.max_model_len, ranks_of(vllm_config)
    return pool_bytes(served.plan, model.dtype, longest, block_size, prompts, ranks)


def ranks_of(vllm_config: Any) -> int:
    """Ranks that share the KV heads."""
    return int(vllm_config.parallel_config.tensor_parallel_size)


def forms(vllm_config: Any, served: Served) -> Any:
    """The form of a prompt of so many tokens, as a function that remembers a few."""
    model, block_size = vllm_config.model_config, vllm_config.cache_config.block_size

    @functools.lru_cache(maxsize=256)
    def form(prompt_tokens: int) -> Form:
        ranks = ranks_of(vllm_config)
        return Form.of(served.plan, model.dtype, prompt_tokens, block_size, ranks)

    return form
