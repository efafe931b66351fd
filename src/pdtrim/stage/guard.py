"""Hold pdtrim's forward of a model against the network's own, before anyone plans on it.

A fact of an architecture that pdtrim does not know of (a window, a scale, a norm) shows here as a
difference, whatever the config calls it.
"""

from __future__ import annotations

import torch

from pdtrim.errors import ModelError, NotFinite, border
from pdtrim.models.model import Model
from pdtrim.plan import Gates
from pdtrim.stage.forward import Batch, Pair, forward

TOKENS = 24
LONGEST = 1024
"""Windows beyond this many tokens are not run past: it would take too long."""
MOST_KL = {torch.float32: 1e-4}
MOST_KL_ROUNDED = 0.05
"""Of 16-bit types, nats a token; two ways to sum in bf16 differ by 0.002 on SmolLM2-135M."""


@torch.inference_mode()
def check_forward(model: Model) -> None:
    """Compare the distributions of a short random text, past the window where it is short.

    Raises:
        ModelError: they differ: pdtrim does not know all of what the model computes.
        NotFinite: the network's own logits are not finite.
    """
    windows = [block.window for block in model.blocks if block and block.window is not None]
    near = [window for window in windows if window <= LONGEST]
    limit = int(getattr(model.config, "max_position_embeddings", None) or LONGEST)
    length = min(max(TOKENS, *(window + 8 for window in near), 0), limit)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, int(model.config.vocab_size), (1, length), generator=generator)
    ids_BT = ids_BT.to(model.device)
    prompt = max(2, length - 8)
    if length <= prompt:
        return  # a model of so few positions cannot be compared, and hardly used
    batch = Batch(prompt_BP=ids_BT[:, :prompt], continuation_BC=ids_BT[:, prompt:])
    with border(ModelError, f"'{model.name}' does not run"):
        theirs = model.network(ids_BT, use_cache=False).logits[:, prompt - 1 : -1].float()
        ours = forward(Pair.dense(model), batch, Gates.dense(model.num_layers)).float()
    if not theirs.isfinite().all():
        raise NotFinite(
            f"'{model.name}' computes logits that are not finite in {model.dtype}: its weights are"
            " damaged, or another --dtype is needed"
        )
    logp, logq = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = float((logp.exp() * (logp - logq)).sum(-1).mean())
    most = MOST_KL.get(model.dtype, MOST_KL_ROUNDED)
    if not kl <= most:
        raise ModelError(
            f"'{model.name}' computes something that pdtrim does not know of: its logits differ"
            f" from pdtrim's by a KL of {kl:.3g}; the architecture is not supported as it is"
        )
