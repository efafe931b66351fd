"""What one request costs each stage of a pair: the dense model's measured times, less what is gone.

A stage's time is what is outside the blocks and, for each layer that it runs, the measured share of
that layer: attention, MLP, or keys and values alone. Decode's attention reads the prompt's tokens
that travelled and what was answered since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pdtrim.cost.handover import CodecFile, Handover, Link, handover
from pdtrim.cost.pair import PairCost
from pdtrim.cost.times import StageTimes
from pdtrim.errors import PdtrimError


@dataclass(frozen=True, kw_only=True)
class Service:
    """Times of one request, in seconds."""

    pair: PairCost
    times: StageTimes
    link: Link
    codecs: Sequence[CodecFile]

    def prefill_s(self, prompt: float) -> float:
        """Of one prompt on one prefill server, without encoding."""
        pair, times, layers = self.pair, self.times, self.times.model.layers
        whole = times.prompt(prompt)
        if pair.attention == pair.mlp == layers:
            return whole
        attention, mlp = (times.prompt(prompt, part) for part in ("attention_s", "mlp_s"))
        kv = times.prompt(prompt, "kv_s") * pair.kv_only if pair.kv_only else 0.0
        blocks = attention * pair.attention + mlp * pair.mlp + kv
        return whole - attention - mlp + blocks / layers

    def step_s(self, rows: float, prompt: float, answered: float) -> float:
        """Of one decode step of a batch in which each sequence has answered so many tokens."""
        pair, times, layers = self.pair, self.times, self.times.model.layers
        context = prompt + answered
        whole = times.step(rows, context)
        contexts = Counter(sent.kept(prompt) + answered for sent in pair.sent)
        if pair.decode_mlp == layers and contexts == {context: layers}:
            return whole
        attention, mlp = (times.step(rows, context, part) for part in ("attention_s", "mlp_s"))
        own = sum(times.step(rows, at, "attention_s") * n for at, n in contexts.items())
        return whole - attention - mlp + (own + mlp * pair.decode_mlp) / layers

    def token_s(self, rows: float, prompt: float, answer: float) -> float:
        """Of one token, halfway through its answer, in a batch that takes its handovers in.

        A handover holds the whole batch up, and each of its places is filled once an answer.
        """
        held = rows * self.handover(prompt).held_s / answer
        return self.step_s(rows, prompt, answer / 2) + held

    def handover(self, prompt: float) -> Handover:
        """Of one prompt."""
        return handover(
            self.pair,
            self.times.model,
            prompt,
            itemsize=self.times.itemsize,
            link=self.link,
            files=self.codecs,
        )

    def kv_bytes(self, prompt: float, answer: float) -> float:
        """Of one sequence in decode's memory, when its answer is whole."""
        layer_bytes = self.times.model.layer_pairs * self.times.itemsize
        return sum(sent.kept(prompt) + answer for sent in self.pair.sent) * layer_bytes

    def decode_weights(self) -> float:
        """Bytes of decode's weights on one server."""
        shape, pair = self.times.model, self.pair
        gone = (shape.layers - pair.decode_attention) * shape.attention_parameters
        gone += (shape.layers - pair.decode_mlp) * shape.mlp_parameters
        return float(shape.parameters - gone) * self.times.itemsize

    def rows_in_memory(self, prompt: float, answer: float, memory_use: float) -> int:
        """Sequences that one decode server can hold.

        Raises:
            PdtrimError: not even one.
        """
        memory = self.times.gpus * self.times.gpu_memory_bytes * memory_use
        left, one = memory - self.decode_weights(), self.kv_bytes(prompt, answer)
        rows = int(left / one) if one > 0 else self.times.most_rows
        if rows < 1:
            raise PdtrimError(
                f"decode's weights and one sequence of {prompt + answer:,.0f} tokens do not fit"
                f" {self.times.gpus} x {self.times.system}"
            )
        return rows
