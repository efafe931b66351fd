"""KL(dense || student) on continuation tokens, over the whole vocabulary, and its gradient.

The dense model's word is kept as its last stream, E numbers a token: its logits are the head's
work away, and V of them a token would fill the memory.

The student's logits are never all there either. The gradient of KL(p || softmax(z)) with respect
to z is ``softmax(z) - p``, so each slice of positions is taken through the head and back at once,
and what stays is the gradient of the last stream.

Shapes: B batch, C continuation tokens, E hidden width, R positions of a slice, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pdtrim.calibration.teacher import head_rows
from pdtrim.models.model import Model
from pdtrim.stage.forward import Batch, Trimmed

SLICE_LOGITS = 2**27
"""Logits held at once on a GPU: 512 MB in fp32, some five times that with the temporaries."""


@torch.no_grad()
def dense_stream(model: Model, batch: Batch) -> Tensor:
    """The dense model's last stream ``[B, C, E]``."""
    return Trimmed.dense(model).last_stream(batch)


@torch.no_grad()
def kl_of(head: Model, dense_BCE: Tensor, student_BCE: Tensor) -> Tensor:
    """KL of each token ``[B, C]`` in nats, of the head's word on two last streams."""
    parts = [_kl(head, p, q)[0] for p, q in _slices(head, dense_BCE, student_BCE)]
    return torch.cat(parts).view(dense_BCE.shape[:2])


def backward_kl(
    student: Trimmed,
    batch: Batch,
    dense_BCE: Tensor,
    *,
    share: float = 1.0,
    entry: tuple[Tensor, Tensor] | None = None,
    start: int = 0,
) -> Tensor:
    """Add the gradient of the batch's mean KL to the student's weights that require one.

    Args:
        student: a stage without trained weights is not recorded, but for what a trained prefill
            changes in decode.
        share: of the batch in its step; multiplies the gradient only.
        entry: the streams that enter layer ``start``, before which nothing trains.

    Returns:
        The mean KL, nats a token, on the batch's device.
    """
    with torch.enable_grad():
        trace = None if entry is None else [entry] * (start + 1)
        student_BCE = student.streams(batch, resume=trace, start=start)[-1][1]
    decode = student.pair.decode
    scale = share / dense_BCE[..., 0].numel()
    total = student_BCE.new_zeros((), dtype=torch.float32)
    grads: list[Tensor] = []
    for p_RE, q_RE in _slices(decode, dense_BCE, student_BCE.detach()):
        q_RE.requires_grad_()
        with torch.enable_grad():
            logits_RV = decode.head(q_RE)
        kl_R, slope_RV = _kl(decode, p_RE, q_RE, logits_RV)
        slope_RV = slope_RV.mul_(scale).to(logits_RV.dtype)
        grads += torch.autograd.grad(logits_RV, q_RE, slope_RV)
        total += kl_R.sum()
    student_BCE.backward(torch.cat(grads).view_as(student_BCE))
    return total / dense_BCE[..., 0].numel()


@torch.no_grad()
def _kl(
    head: Model, p_RE: Tensor, q_RE: Tensor, logits_RV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """KL of each position, and its gradient with respect to the student's logits."""
    logp_RV = F.log_softmax(head.head(p_RE), -1, dtype=torch.float32)
    logits_RV = head.head(q_RE) if logits_RV is None else logits_RV
    logq_RV = F.log_softmax(logits_RV, -1, dtype=torch.float32)
    p_RV = logp_RV.exp()
    kl_R = logp_RV.sub_(logq_RV).mul_(p_RV).sum(-1)
    return kl_R, logq_RV.exp_().sub_(p_RV)


def _slices(head: Model, dense_BCE: Tensor, student_BCE: Tensor) -> list[tuple[Tensor, Tensor]]:
    device = dense_BCE.device
    on_gpu = device.type != "cpu"
    rows = max(1, SLICE_LOGITS // head.config.vocab_size) if on_gpu else head_rows(device)
    flat = (y.flatten(0, 1).split(rows) for y in (dense_BCE, student_BCE))
    return list(zip(*flat, strict=True))
