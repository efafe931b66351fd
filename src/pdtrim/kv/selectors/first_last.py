"""Keep the first and the last tokens of the prompt, drop the middle.

``kept = [0, first) + [n - last, n)`` of the n tokens handed over.

Paper: PDTrim (arXiv 2509.04467, v1 to v3), "token-aware cache pruning"; the rule is that of
attention sinks (StreamingLLM, 2309.17453) applied to the prompt once, at the handover, in selected
layers only. Different from StreamingLLM: tokens that decode adds are all kept, and positions are
not re-numbered. Different from the paper: with an engine whose pages hold ``block_size`` tokens the
kept runs round outward to whole pages, because a page is what such an engine can send or free.
"""


def first_last(
    tokens: int, *, first: int, last: int, block_size: int = 1
) -> tuple[tuple[int, int], ...]:
    """Kept runs; a single run when the two meet."""
    head = min(tokens, -(-first // block_size) * block_size)
    tail = max(0, tokens - last) // block_size * block_size
    if head >= tail:
        return ((0, tokens),) if tokens else ()
    return tuple(run for run in ((0, head), (tail, tokens)) if run[0] < run[1])
