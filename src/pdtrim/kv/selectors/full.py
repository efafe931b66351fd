"""Keep every token. The dense baseline, and the rule of layers that a policy does not select."""


def full(tokens: int) -> tuple[tuple[int, int], ...]:
    """One run of all tokens; none for an empty prompt."""
    return ((0, tokens),) if tokens else ()
