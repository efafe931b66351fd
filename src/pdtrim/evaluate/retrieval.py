"""Retrieval prompts that need no download: a fact stands in filler text and is asked at the end.

Four tasks:

* ``needle``: one code in the filler.
* ``multikey``: the same among codes of other words.
* ``tracking``: a number is handed from box to box; the last box is asked. A second chain distracts.
* ``system``: a rule at the very start, to be followed at the end.

The question ends in the words of the fact, so that a small base model only has to go on. An answer
is always several tokens: engines that take the first output token from prefill would score an
answer of one token without ever reading the KV cache that decode received. Numbers have 5 to 7
digits, for some vocabularies hold years and round numbers of 4 as one token; passwords are two
words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

from pdtrim.errors import PdtrimError

DISTRACTORS = 4  # other codes in multikey
LINKS = 3  # boxes in a chain of tracking


def _words(text: str, separator: str | None = None) -> list[str]:
    return text.split(separator)


# Filler and facts draw from word lists that share nothing, so that filler never names a fact.
PEOPLE = _words("""farmer teacher sailor baker doctor painter neighbour gardener miller tailor
    weaver driver librarian musician carpenter student cook postman shepherd nurse fisherman potter
    mason singer hunter clerk poet merchant guard visitor cousin aunt uncle child widow stranger
    judge dancer mechanic beekeeper""")
MANNERS = _words("""quiet cheerful tired careful clever young old patient curious gentle proud shy
    busy honest lonely friendly stubborn sleepy brave polite""")
ACTIONS = _words("""carried found painted sold mended admired borrowed cleaned lifted dropped drew
    hid bought noticed wrapped polished counted fetched described measured repaired collected
    offered returned opened studied packed guarded covered washed chose lost moved brought kept held
    wanted praised shared sketched""")
THINGS = _words("""basket lamp chair kettle blanket letter hat bicycle drum loaf rope spoon mirror
    coat ladder bell candle cushion violin saddle bucket shovel notebook hammer teapot scarf carpet
    fence wheel map vase jacket pillow clock bottle necklace kite barrel bench whistle""")
PLACES = _words("""market mill station kitchen orchard church library bridge meadow village school
    stable forest cellar river hall workshop beach attic garden square tavern barn valley museum
    theatre courtyard bakery pond hillside cottage field corner terrace quarry windmill chapel shore
    crossroads hotel""")
TIMES = _words(
    "before breakfast,after the rain,at dawn,in the evening,during the storm,on a cold morning,"
    "late at night,in early spring,around noon,after a long walk,while the others slept,"
    "as the sun went down,without a word,in a great hurry,with some help,for the second time",
    ",",
)
PREPOSITIONS = _words("near behind beside outside by")
KEYS = _words("""harbor falcon marble copper lantern saffron walnut granite velvet compass thunder
    meteor glacier maple cactus pepper dolphin ivory jasmine magnet nectar pelican quartz raven
    sapphire tulip violet willow zephyr amber birch cobalt dragon ember fossil ginger""")
TRIVIA = (
    ("What colour is grass?", "Grass is green"),
    ("What do cows eat?", "Cows eat grass"),
    ("Where do fish live?", "Fish live in water"),
    ("What falls from clouds?", "Rain falls from clouds"),
    ("What do birds build?", "Birds build nests"),
    ("What is ice made of?", "Ice is made of water"),
)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One prompt with a known answer.

    ``context + question`` is the prompt. The question does not end in a space; the answer starts
    with one and is more than one token. ``depth`` is the share of the filler, 0 to 1, that stands
    before the asked fact (``tracking``: before the first link, the one with the number).
    """

    task: str
    context: str
    question: str
    answer: str
    depth: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.depth <= 1.0:
            raise PdtrimError(f"a probe's depth lies in 0..1, not {self.depth}")
        if self.question[-1:].isspace() or not self.answer.startswith(" "):
            raise PdtrimError("a probe's question ends without a space and its answer starts so")

    @property
    def prompt(self) -> str:
        """Context and question."""
        return self.context + self.question


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A probe before its filler: each fact with the share of filler before it, in order."""

    facts: list[tuple[float, str]]
    question: str
    answer: str

    def context(self, filler: list[str]) -> str:
        sentences = list(filler)
        # from the back, so that an insertion does not shift the places still to come
        for share, fact in reversed(self.facts):
            sentences.insert(round(share * len(filler)), fact)
        return " ".join(sentences)


def tasks() -> tuple[str, ...]:
    """Names of the tasks."""
    return tuple(_DRAFTS)


def generate(
    task: str,
    *,
    count: int,
    seed: int,
    words: int = 400,
    count_tokens: Callable[[str], int] | None = None,
    tokens: int | None = None,
) -> list[Probe]:
    """``count`` probes of a task, depths spread evenly over 0..1; the same seed gives the same.

    ``system`` probes all have depth 0: their rule opens the prompt.

    Args:
        task: one of :func:`tasks`.
        count: probes; a single one has depth 0.5.
        seed: of words, numbers and filler. Probe i is the same text whatever the task's ``count``,
            but for its depth.
        words: filler words, about; without effect when ``tokens`` is given.
        count_tokens: tokens of a text, as the model's tokenizer counts them.
        tokens: the most tokens a prompt may have; filler is added while it fits, a sentence at a
            time, so that fewer than about 20 stay unused.

    Raises:
        PdtrimError: unknown task, count below 1, negative words, a budget without a counter or the
            reverse, or one too small for the facts and the question alone.
    """
    if task not in _DRAFTS:
        raise PdtrimError(f"unknown retrieval task '{task}': choose from {', '.join(_DRAFTS)}")
    if count < 1 or words < 0:
        raise PdtrimError("retrieval needs a count of at least 1, and words of at least 0")
    if (count_tokens is None) != (tokens is None):
        raise PdtrimError("give count_tokens and tokens together, or neither")
    probes = []
    for i in range(count):
        rng = random.Random(f"{task} {seed} {i}")
        depth = 0.0 if task == "system" else i / (count - 1) if count > 1 else 0.5
        draft = _DRAFTS[task](rng, depth)
        if count_tokens is None or tokens is None:
            filler = _by_words(rng, words)
        else:
            filler = _by_tokens(rng, draft, count_tokens, tokens)
        probes.append(
            Probe(
                task=task,
                context=draft.context(filler),
                question=draft.question,
                answer=draft.answer,
                depth=depth,
            )
        )
    return probes


def _sentences(rng: random.Random) -> Iterator[str]:
    """Filler without end, no digits, no sentence twice."""
    seen: set[str] = set()
    while True:
        person = f"the {rng.choice(MANNERS)} {rng.choice(PEOPLE)}"
        place = f"{rng.choice(PREPOSITIONS)} the {rng.choice(PLACES)}"
        deed = f"{rng.choice(ACTIONS)} a {rng.choice(THINGS)}"
        time = rng.choice(TIMES)
        text = rng.choice(
            (
                f"{person} {deed} {place} {time}.",
                f"{time}, {person} {deed} {place}.",
                f"{place}, {person} {deed} {time}.",
                f"{person} {deed} {time}.",
            )
        )
        if text not in seen:
            seen.add(text)
            yield text[0].upper() + text[1:]


def _by_words(rng: random.Random, words: int) -> list[str]:
    filler: list[str] = []
    have = 0
    stream = _sentences(rng)
    while have < words:
        filler.append(next(stream))
        have += len(filler[-1].split())
    return filler


def _by_tokens(
    rng: random.Random, draft: _Draft, count_tokens: Callable[[str], int], tokens: int
) -> list[str]:
    """The longest filler that fits. Doubling, then bisection: tokenizing is the cost here."""
    stream = _sentences(rng)
    filler: list[str] = []

    def fits(sentences: int) -> bool:
        filler.extend(islice(stream, max(0, sentences - len(filler))))
        return count_tokens(draft.context(filler[:sentences]) + draft.question) <= tokens

    if not fits(0):
        raise PdtrimError(f"a prompt of {tokens} tokens has no room for the facts and the question")
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return filler[:low]


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Numbers of 5 to 7 digits, none part of another: each can be found in a text by itself."""
    found: list[str] = []
    while len(found) < count:
        digits = rng.randint(5, 7)
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if not any(number in other or other in number for other in found):
            found.append(number)
    return found


def _codes(rng: random.Random, depth: float, distractors: int) -> _Draft:
    keys = rng.sample(KEYS, distractors + 1)
    numbers = _numbers(rng, distractors + 1)
    shares = [depth, *(rng.random() for _ in range(distractors))]
    codes = [
        (share, f"The secret code for {key} is {number}.")
        for share, key, number in zip(shares, keys, numbers, strict=True)
    ]
    asked = f"the secret code for {keys[0]}"
    return _Draft(
        facts=sorted(codes),
        question=f"\nQuestion: What is {asked}?\nAnswer: T{asked[1:]} is",
        answer=f" {numbers[0]}",
    )


def _chain(boxes: list[str], number: str) -> list[str]:
    links = [f"The number in the {boxes[0]} box is {number}."]
    for before, after in pairwise(boxes):
        links.append(f"The {after} box holds the same number as the {before} box.")
    return links


def _tracking(rng: random.Random, depth: float) -> _Draft:
    boxes = rng.sample(KEYS, 2 * LINKS)
    asked, other = _numbers(rng, 2)
    shares = [depth + (1.0 - depth) * i / LINKS for i in range(LINKS)]
    facts = [
        *zip(shares, _chain(boxes[:LINKS], asked), strict=True),
        *zip(sorted(rng.random() for _ in shares), _chain(boxes[LINKS:], other), strict=True),
    ]
    box = f"the {boxes[LINKS - 1]} box"
    return _Draft(
        # by share alone: links of one chain keep their order where shares are equal
        facts=sorted(facts, key=lambda fact: fact[0]),
        question=f"\nQuestion: What is the number in {box}?\nAnswer: The number in {box} is",
        answer=f" {asked}",
    )


def _system(rng: random.Random, depth: float) -> _Draft:
    password = "-".join(rng.sample(KEYS, 2))
    asked, reply = rng.choice(TRIVIA)
    return _Draft(
        facts=[
            (depth, f"Rule: every answer ends with the password, and the password is {password}.")
        ],
        question=f"\nQuestion: {asked}\nAnswer: {reply}, and the password is",
        answer=f" {password}",
    )


_DRAFTS: dict[str, Callable[[random.Random, float], _Draft]] = {
    "needle": lambda rng, depth: _codes(rng, depth, 0),
    "multikey": lambda rng, depth: _codes(rng, depth, DISTRACTORS),
    "tracking": _tracking,
    "system": _system,
}
