"""Damage to bytes and to JSON, by a seeded generator: what a disk, a link or an attacker does."""

import copy
import json
import random
import struct

NUMBERS = (0, 1, 7, 8, 127, 128, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
WORDS = (
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b[31m", b"NaN", b"1e999"),
    *(b"null", b"{", b"}", b"[", b'"', b"\\ud800", b"-1", b"9" * 5000, b"[" * 200, b"../", b"\n"),
    *(b"GGUF", b"PDKV", b"\x1f\x8b", b"PK\x03\x04", b"version https://git-lfs"),
)
VALUES = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.0, -0.5, 1e-320, 1e308, "", "x"),
    *("\x1b[2J", "\ud800", "[/red]", "../../etc", "9" * 400, [], {}, [[]], [None], {"": {}}),
)
DEEP = 100_000


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three kinds of damage; never the same bytes."""
    made = data
    while made == data:
        for _ in range(rng.randint(1, 3)):
            made = rng.choice(KINDS)(made, rng)
    return made


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit."""
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def number(data: bytes, rng: random.Random) -> bytes:
    """A number at the edge of its type, anywhere; mostly near the begin, where headers are."""
    form = rng.choice(("<B", "<H", "<I", "<Q", ">I"))
    size = struct.calcsize(form)
    reach = len(data) if rng.random() < 0.5 else min(len(data), 256)
    at = rng.randrange(max(1, reach))
    value = rng.choice(NUMBERS) % 256**size
    return data[:at] + struct.pack(form, value) + data[at + size :]


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end is gone."""
    return data[: rng.randrange(len(data) + 1)]


def hole(data: bytes, rng: random.Random) -> bytes:
    """A run of bytes is gone."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randint(1, 64) :]


def zeros(data: bytes, rng: random.Random) -> bytes:
    """A run of zeros, as an unwritten sector leaves it."""
    at, size = rng.randrange(len(data) + 1), rng.randint(1, 512)
    return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]


def word(data: bytes, rng: random.Random) -> bytes:
    """Something that means much to a reader, put in."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(WORDS) + data[at:]


def again(data: bytes, rng: random.Random) -> bytes:
    """A part stands twice, or two parts have changed places."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:] if rng.random() < 0.5 else data[b:] + data[:b]


KINDS = (flip, flip, number, number, cut, hole, zeros, word, again)


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """Valid JSON that says something else at one or two places; some of it is not valid after all.

    Integers of thousands of digits and deep nesting are written as text: Python's writer refuses.
    """
    made = json.loads(data)
    for _ in range(rng.randint(1, 2)):
        place = _place(made, rng)
        if place is None:
            return damaged(data, rng)
        parent, key = place
        choice = rng.random()
        if choice < 0.15 and isinstance(parent, dict):
            del parent[key]
        elif choice < 0.25 and isinstance(parent, dict):
            parent[f"{key}x"] = copy.deepcopy(parent[key])
        elif choice < 0.35 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(made)
    if rng.random() < 0.05:
        text = text.replace("1", rng.choice(("1" * 5000, "[" * DEEP, "Infinity", "1e999")), 1)
    return text.encode("utf-8", "surrogatepass")


def _place(made, rng):
    """A list or an object and a key in it, each as likely as any."""
    places, rest = [], [made]
    while rest:
        item = rest.pop()
        if isinstance(item, dict | list):
            keys = list(item) if isinstance(item, dict) else list(range(len(item)))
            places += [(item, key) for key in keys]
            rest += [item[key] for key in keys]
    return rng.choice(places) if places else None
