import gzip
import itertools
import json

import pytest
import torch

from pdtrim.calibration.batches import CalibrationConfig, load_calibration, text_batch
from pdtrim.calibration.mixture import load_mixture
from pdtrim.calibration.sources import read_documents
from pdtrim.errors import CalibrationError
from pdtrim.models.loading import load_model
from pdtrim.stage.sampler import Sampler, inverse_cdf, nucleus
from pdtrim.stage.sampling import Sampling

SMALL = {"prompt_tokens": 12, "continuation_tokens": 4, "search": 3, "rerank": 2, "fit": 2}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), dtype="float32")


def rows(calibration):
    for part in (calibration.search, calibration.rerank, calibration.fit):
        for row in torch.cat((part.prompt_BP, part.continuation_BC), dim=1).tolist():
            yield tuple(row)


def test_parts_are_disjoint_spans_of_the_text(model, tiny_text):
    text = load_calibration(model, CalibrationConfig(source=str(tiny_text), **SMALL))
    assert [len(p) for p in (text.search, text.rerank, text.fit)] == [3, 2, 2]
    assert text.search.prompt_BP.shape == (3, 12) and text.search.continuation_BC.shape == (3, 4)
    source = model.tokenizer(tiny_text.read_text()).input_ids
    found = []
    for row in rows(text):
        body = [t for t in row if t != model.tokenizer.eos_token_id]
        at = [i for i in range(len(source)) if source[i : i + 6] == list(body[:6])]
        found.append(at[0])
    spans = sorted((at, at + 14) for at in found)
    assert all(a[1] <= b[0] + 1 for a, b in itertools.pairwise(spans))


def test_the_seed_decides_the_text(model, tiny_text):
    hashes = [
        load_calibration(model, CalibrationConfig(source=str(tiny_text), seed=s, **SMALL)).hash
        for s in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_self_written_text_follows_the_model(model):
    config = CalibrationConfig(source="self", **SMALL)
    first, again = (load_calibration(model, config) for _ in range(2))
    assert first.hash == again.hash
    other = load_calibration(model, CalibrationConfig(source="self", seed=7, **SMALL))
    assert other.hash != first.hash
    ids = torch.tensor(list(rows(first)))
    with torch.no_grad():
        logp = model.network(ids).logits[:, :-1].log_softmax(-1)
    own = logp.gather(-1, ids[:, 1:, None]).mean()
    shuffled = ids[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        logp = model.network(shuffled).logits[:, :-1].log_softmax(-1)
    assert own > logp.gather(-1, shuffled[:, 1:, None]).mean() + 0.3


def test_files_of_every_kind_are_read(tmp_path):
    lines = [json.dumps({"text": "a b"}), "", json.dumps({"content": "c"})]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / "t.txt").write_text("a b\n\nc")
    assert list(read_documents(str(tmp_path / "t.jsonl"))) == ["a b", "c"]
    assert list(read_documents(str(tmp_path / "t.jsonl.gz"))) == ["a b", "c"]
    assert list(read_documents(str(tmp_path / "t.txt"))) == ["a b\n\nc"]


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("gone.txt", None, "no text file"),
        ("bad.jsonl", b"{", "not valid JSON"),
        ("none.jsonl", b'{"label": 3}', "line 1 has no text"),
        ("latin.txt", b"\xff\xfd\xff", "not UTF-8"),
        ("fake.jsonl.gz", b"plain", "not valid JSON"),
    ],
)
def test_unreadable_text_is_refused(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=words):
        list(read_documents(str(tmp_path / name)))


def test_too_little_text_says_how_much_is_needed(model, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(CalibrationError, match="7 sequences of 16 need 112"):
        load_calibration(model, CalibrationConfig(source=str(tmp_path / "short.txt"), **SMALL))
    with pytest.raises(CalibrationError, match="at least 1 token"):
        CalibrationConfig(prompt_tokens=0)


def test_held_out_text_is_taken_in_order(model, tiny_text):
    batch = text_batch(model, str(tiny_text), prompt_tokens=5, continuation_tokens=3, limit=4)
    ids = torch.cat((batch.prompt_BP, batch.continuation_BC), dim=1).flatten().tolist()
    assert ids == model.tokenizer(tiny_text.read_text()).input_ids[:32]


def test_a_tokenizer_that_begins_texts_begins_every_sequence(model, tiny_text, monkeypatch):
    plain = model.tokenizer

    class Beginning:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text, add_special_tokens=True, **_):
            ids = plain(text, add_special_tokens=False).input_ids
            return type("Out", (), {"input_ids": [1, *ids] if add_special_tokens else ids})

    monkeypatch.setattr(model, "tokenizer", Beginning())
    batch = text_batch(model, str(tiny_text), prompt_tokens=5, continuation_tokens=3, limit=3)
    assert batch.prompt_BP[:, 0].tolist() == [1, 1, 1]


def test_nucleus_keeps_the_smallest_likely_set():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    assert (nucleus(p, 0.7) > 0).tolist() == [[False, True, False, True], [True, *[False] * 3]]
    assert torch.equal(nucleus(p, 1.0), p)
    wide = torch.full((1, 3000), 1 / 3000)
    assert int((nucleus(wide, 0.9) > 0).sum()) == pytest.approx(2700, abs=2)


def test_draws_follow_the_distribution():
    assert inverse_cdf(
        torch.tensor([[0.0, 0.5, 0.0, 0.5]] * 3), torch.tensor([0.0, 0.49, 0.51])
    ).tolist() == [1, 1, 3]
    sampler = Sampler(Sampling(temperature=1.0, seed=1), 4000)
    drawn = sampler(torch.tensor([0.1, 0.2, 0.7]).log().expand(4000, 3))
    shares = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.03, rtol=0)


def test_a_mixture_takes_from_each_source_what_it_has(model, tiny_text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(" ".join(tiny_text.read_text().split()[:40]))
    said = []
    config = CalibrationConfig(prompt_tokens=8, continuation_tokens=4, search=4, rerank=1, seed=3)
    sources = [str(tiny_text), str(short), "self"]
    data, held_out = load_mixture(model, sources, config, say=said.append)
    assert len(held_out) == 3 and 4 + 1 + 4 <= len(data) < 12
    assert len(said) == 1 and str(short) in said[0]
    rows = torch.cat((data.prompt_BP, data.continuation_BC), dim=1).tolist()
    assert not any(
        row in rows
        for row in torch.cat((held_out.prompt_BP, held_out.continuation_BC), dim=1).tolist()
    )
    own, _ = load_mixture(model, ["self"], config)
    assert rows[-4:] == torch.cat((own.prompt_BP, own.continuation_BC), dim=1).tolist()
    with pytest.raises(CalibrationError, match="name a source"):
        load_mixture(model, [], config)
