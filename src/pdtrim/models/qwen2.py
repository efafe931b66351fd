"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v, and windows by layer type."""

from transformers import PreTrainedConfig

from pdtrim.models.block import Block


class Qwen2Block(Block):
    """Llama's block; its biases live in the projections."""

    @classmethod
    def window_of(cls, config: PreTrainedConfig, slot: int) -> int | None:
        """See :meth:`Block.window_of`."""
        if config.layer_types[slot] != "sliding_attention" or config.sliding_window is None:
            return None
        return int(config.sliding_window)
