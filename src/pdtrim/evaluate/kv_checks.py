"""Whether a measurement of KV policies can be trusted: facts that are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping

KL_SLACK = 1e-3  # nats; rounding
SHARE_SLACK = 0.03
FINDS_ENOUGH = 0.6  # a model that finds fewer needles than this tells nothing about the policy


def sanity(
    suite: Mapping[str, Mapping[str, float]],
    kls: Mapping[str, float],
    *,
    tolerance: float = 0.15,
    full: str = "full",
    first_last: str = "first_last",
    random: str = "random",
) -> list[str]:
    """What is wrong with a measurement; empty when all of this holds:

    * ``full``, everything raw, equals the unpruned model: its KL is 0 to rounding.
    * ``random`` has a larger KL than ``first_last`` at an equal share. Random must not keep the
      first and last tokens itself (``random:first=0,last=0``), or the two are nearly one policy.
    * ``first_last`` in every layer finds, of the needles that ``full`` finds, about the share of
      the prompt that it keeps, as they lie evenly in it. Hidden only: the question stands at the
      prompt's end. Looked at only where ``full`` finds at least 0.6 of them.

    A number that is missing or not a number is a problem too: then nothing was checked.

    Args:
        suite: of :func:`pdtrim.evaluate.kv_suite.run_suite`, with the task ``needle``.
        kls: mean KL to the unpruned model under dense gates, by policy, nats a token, on prompts
            about as long as the probes': the shares are the probes'.
        tolerance: of the found share, absolute.
        full, first_last, random: the names of these policies.
    """
    needle, share = "needle_hidden", "kept_at_most"
    missing = [
        f"'{name}': no KL was measured" for name in (full, first_last, random) if name not in kls
    ]
    for name, metrics in ((full, (needle,)), (first_last, (needle, share)), (random, (share,))):
        measured = suite.get(name, {})
        missing += [f"'{name}': no {key} was measured" for key in metrics if key not in measured]
    if missing:
        return missing
    problems = []
    # each condition is "not (what must hold)", so that NaN fails it
    if not abs(kls[full]) <= KL_SLACK:
        problems.append(
            f"'{full}' keeps everything raw, but its KL to the unpruned model is {kls[full]:.4g}"
        )
    kept, other = suite[first_last][share], suite[random][share]
    if not abs(kept - other) <= SHARE_SLACK:
        problems.append(
            f"'{random}' keeps {other:.3f} and '{first_last}' {kept:.3f} of the prompt: their KLs"
            " do not compare"
        )
    elif not kls[random] > kls[first_last]:
        problems.append(
            f"'{random}' has KL {kls[random]:.4g}, not above '{first_last}' with"
            f" {kls[first_last]:.4g} at an equal share"
        )
    reference, found = suite[full][needle], suite[first_last][needle]
    if not reference < FINDS_ENOUGH and not abs(found - kept * reference) <= tolerance:
        problems.append(
            f"'{first_last}' keeps {kept:.3f} of the prompt and '{full}' finds {reference:.3f} of"
            f" the hidden needles, so it should find about {kept * reference:.3f}, not {found:.3f}"
        )
    return problems
