"""Mistral: Llama's block, and one sliding window for all layers where the config has one."""

from transformers import PreTrainedConfig

from pdtrim.models.block import Block


class MistralBlock(Block):
    """Llama's block with a window; ``use_sliding_window`` and ``layer_types`` change nothing."""

    @classmethod
    def window_of(cls, config: PreTrainedConfig, slot: int) -> int | None:
        """See :meth:`Block.window_of`."""
        del slot
        return None if config.sliding_window is None else int(config.sliding_window)
