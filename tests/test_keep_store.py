"""Kept measurements, journals, texts and trainings: the same settings and every bit, or a line."""

import dataclasses
import json
import random

import pytest
import torch

from helpers import random_batch, tiny_model
from pdtrim.calibration.batches import CalibrationConfig
from pdtrim.calibration.kept import kept_calibration
from pdtrim.distill.checkpoint import SCHEMA, Point, Position, load, save
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.records import PairFacts
from pdtrim.keep.files import CannotWrite
from pdtrim.keep.journal import Journal
from pdtrim.keep.settings import check_same
from pdtrim.keep.store import claim, once
from pdtrim.keep.tensors import load_kept, save_kept
from pdtrim.models.loading import load_model
from test_keep_files import full_disk

FACTS = PairFacts(prefill_removed=0.25, decode_removed=0.5, kv_bytes=1e3)
SETTINGS = {"model": "m", "limit": 16, "lengths": {"prompt": 8}, "texts": ("a", "b")}


def flips(path, count=64):
    """The file with one bit of it altered, at positions all over it."""
    data = path.read_bytes()
    at = range(8 * len(data)) if 8 * len(data) <= count else None
    for bit in at or sorted(random.Random(0).sample(range(8 * len(data)), count)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield bit
    path.write_bytes(data)


def refused(words, use, *args):
    with pytest.raises(PdtrimError, match=words) as told:
        use(*args)
    assert "\n" not in str(told.value)


def test_every_altered_bit_of_a_kept_measurement_is_refused(tmp_path):
    path = tmp_path / "x.json"
    once(path, PairFacts, SETTINGS, lambda: FACTS)
    for bit in flips(path, 400):
        try:
            found = once(path, PairFacts, SETTINGS, lambda: pytest.fail("made again"))
        except PdtrimError as error:
            assert "x.json is damaged or not a kept measurement: delete it" in str(error)
        else:  # white space
            assert found == FACTS, bit


@pytest.mark.parametrize(
    "change,words",
    [
        ({"limit": 5}, "limit 16, now it is 5"),
        ({"lengths": {"prompt": 9}}, r"lengths\.prompt 8, now it is 9"),
        ({"texts": ("a",)}, r'texts \["a", "b"\], now it is \["a"\]'),
        ({"more": 1}, "more null, now it is 1"),
        ({"model": "0" * 64}, r'model "m", now it is 0{12}\.\.\.:'),
    ],
)
def test_other_settings_are_named_wherever_something_is_kept(tmp_path, change, words):
    other = {**SETTINGS, **change}
    cell, text, journal = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    claim(cell, SETTINGS)
    save_kept(text, {"x": torch.ones(2)}, "pdtrim.x/1", SETTINGS, FACTS)
    Journal(journal, SETTINGS)
    before = journal.read_bytes()
    refused(f"was made with {words}", claim, cell, other)
    refused(f"was made with {words}", once, cell, PairFacts, other, None)
    refused(f"was made with {words}", load_kept, text, "pdtrim.x/1", other, PairFacts)
    refused(f"was made with {words}", Journal, journal, other)
    assert journal.read_bytes() == before
    claim(cell, SETTINGS)
    assert load_kept(text, "pdtrim.x/1", SETTINGS, PairFacts)[0] == FACTS
    Journal(journal, SETTINGS)
    check_same(cell, json.loads(json.dumps(SETTINGS)), SETTINGS)


def test_a_value_of_another_kind_is_refused(tmp_path):
    once(tmp_path / "x", Point, {}, lambda: Point(step=1, train_kl=0, held_out_kl=0, seconds=0))
    refused("x is damaged", once, tmp_path / "x", PairFacts, {}, None)
    save_kept(tmp_path / "y", {}, "s", {}, FACTS)
    refused("y: step: Field required; delete it", load_kept, tmp_path / "y", "s", {}, Point)


# journals


def journal_of(path, count=5):
    journal = Journal(path, {"search": "a"})
    return [journal.once({"key": i}, lambda i=i: [i / 3, 1e-9]) for i in range(count)]


def replay(path, count=5):
    """The values of a search of ``count`` measurements, and how many were made anew."""
    made = []
    journal = Journal(path, {"search": "a"})
    values = [
        journal.once({"key": i}, lambda i=i: made.append(i) or [i / 3, 1e-9]) for i in range(count)
    ]
    return values, made


def test_no_altered_bit_of_a_journal_is_replayed(tmp_path):
    path = tmp_path / "journal"
    wanted = journal_of(path)
    told = set()
    for _ in flips(path, 300):
        try:
            values, _ = replay(path)
        except PdtrimError as error:
            assert "\n" not in str(error)
            told.add(str(error).split(": ")[0].split(", line")[0].replace(str(path), "it"))
        else:  # the end of the last line: it is measured again
            assert values == wanted
    assert told == {"it is damaged or no journal of this version", "it"}


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: [*lines[:2], lines[2].replace(b"0.3", b"0.4"), *lines[3:]],
        lambda lines: [*lines[:2], b'{"key": 1, "values": [1]}\n', *lines[3:]],
        lambda lines: [*lines[:2], b"[]\n", *lines[3:]],
    ],
    ids=["lost", "moved", "doubled", "altered", "foreign", "no record"],
)
def test_a_damaged_line_is_refused_with_its_number(tmp_path, change):
    path = tmp_path / "journal"
    wanted = journal_of(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))
    refused("line 3 is damaged: remove that line and all behind it", replay, path)
    path.write_bytes(b"".join(lines[:2]))
    assert replay(path) == (wanted, [1, 2, 3, 4])
    assert replay(path) == (wanted, [])


def test_a_full_disk_leaves_a_journal_that_goes_on(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, {"search": "a"})
    journal.once({"key": 0}, lambda: [0.0, 1e-9])
    before = path.read_bytes()
    with full_disk(len(before) + 5), pytest.raises(CannotWrite, match="cannot write"):
        journal.once({"key": 1}, lambda: [1 / 3, 1e-9])
    assert path.read_bytes() == before
    journal.once({"key": 1}, lambda: [1 / 3, 1e-9])
    assert replay(path, 2) == ([[0.0, 1e-9], [1 / 3, 1e-9]], [])


# texts


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), dtype="float32")


def test_a_kept_text_belongs_to_its_source_file_model_and_options(model, tiny_text, tmp_path):
    source = tmp_path / "words.txt"
    source.write_text(tiny_text.read_text())
    sizes = {"prompt_tokens": 12, "continuation_tokens": 4, "search": 3, "rerank": 2}
    config = CalibrationConfig(source=str(source), **sizes)
    path = tmp_path / "out" / "text.safetensors"
    first = kept_calibration(model, config, path)
    again = kept_calibration(model, config, path)
    assert (again.hash, again.source) == (first.hash, first.source)
    assert torch.equal(again.rerank.continuation_BC, first.rerank.continuation_BC)
    other = dataclasses.replace(config, seed=1)
    refused("made with seed 0, now it is 1", kept_calibration, model, other, path)
    stranger = tiny_model("llama", seed=1)
    refused("made with model", kept_calibration, stranger, config, path)
    for _ in flips(path):
        refused(str(path), kept_calibration, model, config, path)
    with source.open("a") as file:
        file.write(" w1")
    refused("made with source_sha256", kept_calibration, model, config, path)


# trainings


def training(path, masters, step=3):
    groups = {
        group: {key: part.clone() for key, part in masters.items()}
        for group in ("weight", "mean", "square")
    }
    groups["best"] = {key: part.bfloat16() for key, part in masters.items()}
    point = Point(step=0, train_kl=None, held_out_kl=0.5, seconds=0.1)
    position = Position(step=step, seconds=2.0, losses=[0.25], history=[point])
    save(path, SETTINGS, position, groups)
    return position, groups


def test_every_altered_bit_of_a_training_is_refused(tmp_path):
    path = tmp_path / "x.training.safetensors"
    masters = {"1.mlp.up_proj.weight": torch.randn(4, 3), "1.norm": torch.randn(3)}
    position, groups = training(path, masters)
    found, tensors = load(path, SETTINGS, masters, torch.bfloat16)
    assert found == position and tensors.keys() == groups.keys()
    assert torch.equal(tensors["best"]["1.norm"], groups["best"]["1.norm"])
    for _ in flips(path, 300):
        refused(str(path), load, path, SETTINGS, masters, torch.bfloat16)


def test_a_training_of_other_tensors_is_refused(tmp_path):
    path, masters = tmp_path / "x.safetensors", {"1.norm": torch.randn(3)}
    training(path, masters)
    for others, best in (
        ({"1.norm": torch.randn(4)}, torch.bfloat16),
        ({"1.norm": masters["1.norm"], "2.norm": torch.randn(3)}, torch.bfloat16),
        ({}, torch.bfloat16),
        (masters, torch.float32),
    ):
        refused("does not fit this training: see", load, path, SETTINGS, others, best)
    nowhere = Position(step=-1, seconds=0, losses=[], history=[])
    save_kept(path, {}, SCHEMA, SETTINGS, nowhere)
    refused("delete it to start anew", load, path, SETTINGS, masters, torch.bfloat16)


def test_ids_of_another_shape_are_another_text():
    from pdtrim.keep.tensors import ids_digest

    ids = random_batch(tiny_model("llama")).prompt_BP
    assert ids_digest(ids) != ids_digest(ids.reshape(1, -1))
    assert ids_digest(ids) == ids_digest(ids.to(torch.int32))
