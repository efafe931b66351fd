"""Everything that pdtrim reads, damaged at random: ``make fuzz``.

Each target reads damaged bytes as a user's run would. Allowed are an error of ours on one line, or
a result. For what carries a hash (frames, ranges, pairs, blocks, journals, kept files) a result
must be what was written, bit by bit: anything else is a change that was accepted. An input that
takes longer than ``SECONDS`` is a hang.
"""

import argparse
import collections
import contextlib
import csv
import gzip
import io
import json
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gguf_files import write_gguf
from helpers import first_last, make_plan, tiny_model
from mutations import damaged, damaged_json
from pdtrim.bundle import TrimPlan, export
from pdtrim.calibration.sources import read_documents
from pdtrim.calibration.tokens import encode
from pdtrim.engines.ranges import Form
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.records import Comparison
from pdtrim.evaluate.result import Result
from pdtrim.exported import check_base, load_pair
from pdtrim.keep.journal import Journal
from pdtrim.keep.store import once
from pdtrim.keep.tensors import load_kept, save_kept
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.frame import Layout, SentLayer, encode_frame
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.wire import FrameReader
from pdtrim.kvfit.policy import parse_policy
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates, LayerKV, PrunePlan
from pdtrim.reading.requests import RequestLog
from pdtrim.reading.text import clean

SECONDS = 20
MEMORY = 12 * 2**30
REPOSITORY = Path(__file__).parent.parent
SETTINGS = {"model": "m", "seed": 1}


class AcceptedError(AssertionError):
    """A damaged payload was taken for a sound one."""


class HangError(Exception):
    """An input took too long."""


def same(found, wanted):
    """Fail unless a result is what was written."""
    if found != wanted:
        raise AcceptedError("a damaged payload was accepted")


def equal(found, wanted):
    """The same for tensors by name."""
    same(found.keys(), wanted.keys())
    for name, tensor in wanted.items():
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor):
            raise AcceptedError(f"'{name}' of a damaged payload was accepted")


class Frames:
    """Frames over a socket, and staged ranges of vLLM."""

    share = 30

    def __init__(self, folder):
        model = tiny_model("llama")
        codecs = ("int4:group=8,first=1,recent=2", "fp8", "lossless", "entropy")
        rules = tuple(LayerKV(codec=parse_codec(codec)) for codec in codecs)
        cut = LayerKV(selector=first_last(2, 3).selector, codec=rules[0].codec)
        self.plans = [
            make_plan(model, Gates.removing(4), rules, block_size=8),
            make_plan(model, Gates.removing(4, prefill={1}), (cut, LayerKV(), cut, LayerKV())),
        ]
        self.layouts = [Layout.of(plan, torch.bfloat16, 21) for plan in self.plans]
        self.frames = []
        for layout in self.layouts:
            generator = torch.Generator().manual_seed(1)
            layers = {}
            for entry in layout.entries:
                G, D = entry.num_heads, layout.head_dim
                keep_GN = entry.static_GN
                if keep_GN is None:
                    keep_GN = torch.ones(G, layout.tokens, dtype=torch.bool)
                at = keep_GN[0].nonzero()[:, 0]
                k, v = (
                    torch.randn(1, G, len(at), D, generator=generator).to(layout.dtype)
                    for _ in "kv"
                )
                group = HeadGroup(
                    heads=tuple(range(G)), k_BgMD=k, v_BgMD=v, positions_BgM=at.expand(1, G, -1)
                )
                layers[entry.layer] = SentLayer(keep_GN=keep_GN, groups=[group])
            pieces = encode_frame(layout, bytes(16), layers)
            self.frames.append(b"".join(piece.numpy().tobytes() for piece in pieces))
        self.form = Form.of(self.plans[0], torch.bfloat16, 22, 8)
        room = torch.zeros(self.form.most, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(2)
        kept = [
            tuple(torch.randn(2, part.tokens, 8, generator=generator).bfloat16() for _ in "kv")
            for part in self.form.parts
        ]
        self.range = room[: self.form.write(room, bytes(16), kept)].numpy().tobytes()

    def __call__(self, rng):
        which = rng.randrange(3)
        if which == 2:
            data = damaged(self.range, rng)
            yield data
            staged = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
            )
            list(self.form.read(staged[: self.form.most], bytes(16)))
            same(data[: len(self.range)], self.range)
            return
        data, layout = damaged(self.frames[which], rng), self.layouts[which]
        yield data
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.settimeout(5)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)
            ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
            reader = FrameReader(theirs)
            opening = reader.opening()
            if opening is None:
                return
            reader.body(opening, layout)
        same(data[: len(self.frames[which])], self.frames[which])


class Plans:
    """Plan files."""

    share = 20

    def __init__(self, folder):
        self.path = folder / "plan.json"
        model = self.model = tiny_model("llama")
        rules = (LayerKV(codec=parse_codec("int3:rotate=true")), first_last(2, 3)) * 2
        self.plan = make_plan(model, Gates.removing(4, prefill={1}, decode={2}), rules)
        self.data = json.dumps(self.plan.to_json(), indent=1).encode()

    def __call__(self, rng):
        data = rng.choice((damaged, damaged_json))(self.data, rng)
        yield data
        self.path.write_bytes(data)
        made = PrunePlan.load(self.path)
        if made.digest == self.plan.digest:
            check_base(self.model, made)
            told = {"name": "", "revision": ""}  # what it is called, not what it is
            same(*(dict(plan.to_json()["model"], **told) for plan in (made, self.plan)))
        else:  # another plan, as valid as this one
            PrunePlan.from_json(made.to_json(), source="again")


class Blocks:
    """Weights beside a plan file."""

    share = 5

    def __init__(self, folder):
        self.model = tiny_model("llama")
        weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
        self.weights = {"mlp.down_proj.weight": weight}
        plan = make_plan(self.model, Gates.removing(4, prefill={1}))
        self.path = folder / "plan.json"
        TrimPlan.of(plan, {"decode": {1: self.weights}}).save(self.path)
        (self.file,) = (folder / "plan.blocks").glob("*.safetensors")
        self.data = self.file.read_bytes()

    def __call__(self, rng):
        data = damaged(self.data, rng)
        yield data
        self.file.write_bytes(data)
        equal(TrimPlan.open(self.path).blocks(self.model)["decode"][1], self.weights)


class Pairs:
    """Exported pairs: one damaged file of either stage."""

    share = 8

    def __init__(self, folder):
        model = tiny_model("llama", vocab_size=64)
        model.tokenizer = words()
        plan = make_plan(model, Gates.removing(4, prefill={1}))
        self.folder = export(plan, model, folder / "pair")
        self.files = sorted(path for path in self.folder.rglob("*.*") if path.is_file())
        self.data = {path: path.read_bytes() for path in self.files}
        self.wanted = self._read()

    def _read(self):
        pair, plan = load_pair(self.folder)
        stages = {"prefill": pair.prefill.network, "decode": pair.decode.network}
        return plan.digest, {
            f"{stage}.{name}": tensor
            for stage, network in stages.items()
            for name, tensor in network.state_dict().items()
        }

    def __call__(self, rng):
        path = rng.choice(self.files)
        kinds = (damaged, damaged_json) if path.suffix == ".json" else (damaged,)
        data = rng.choice(kinds)(self.data[path], rng)
        yield path.name.encode() + b"\n" + data
        path.write_bytes(data)
        try:
            digest, weights = self._read()
            same(digest, self.wanted[0])
            equal(weights, self.wanted[1])
        finally:
            path.write_bytes(self.data[path])


class Models:
    """Folders of a model: config, special tokens, tokenizer, weights. Weights carry no hash."""

    share = 8

    def __init__(self, folder):
        self.folder = folder / "model"
        tiny_model("qwen2", layers=2, vocab_size=64).network.save_pretrained(self.folder)
        words().save_pretrained(self.folder)
        self.files = sorted(path for path in self.folder.iterdir() if path.is_file())
        self.data = {path: path.read_bytes() for path in self.files}

    def __call__(self, rng):
        path = rng.choice(self.files)
        kinds = (damaged, damaged_json) if path.suffix == ".json" else (damaged,)
        data = rng.choice(kinds)(self.data[path], rng)
        yield path.name.encode() + b"\n" + data
        path.write_bytes(data)
        try:
            load_model(str(self.folder), dtype="float32")
        finally:
            path.write_bytes(self.data[path])


class Ggufs:
    """GGUF files. Weights carry no hash."""

    share = 6

    def __init__(self, folder):
        model = tiny_model("llama", layers=1, vocab_size=64)
        self.path = write_gguf(folder / "model.gguf", model)
        self.data = self.path.read_bytes()

    def __call__(self, rng):
        head = rng.randrange(64, 4096)  # most of the damage where the facts are
        data = damaged(self.data[:head], rng) + self.data[head:]
        if rng.random() < 0.2:
            data = damaged(self.data, rng)
        yield data
        self.path.write_bytes(data)
        load_model(str(self.path), dtype="float32")


class Journals:
    """Journals of a search: what they give back is what was measured."""

    share = 12

    def __init__(self, folder):
        self.path = folder / "journal.jsonl"
        journal = Journal(self.path, SETTINGS)
        for i in range(12):
            journal.once({"at": i}, lambda i=i: [i, i / 7])
        self.data = self.path.read_bytes()

    def __call__(self, rng):
        data = damaged(self.data, rng)
        yield data
        self.path.write_bytes(data)
        journal = Journal(self.path, SETTINGS)
        for i in range(12):
            same(journal.once({"at": i}, lambda i=i: [i, i / 7]), [i, i / 7])


class Kept:
    """Kept measurements, and tensors kept with their settings."""

    share = 12

    def __init__(self, folder):
        self.value = {"kl": [0.1, 0.2], "name": 3.0}
        self.cell, self.tensors = folder / "cell.json", folder / "kept.safetensors"
        self._once(lambda: {"kl": [0.1, 0.2], "name": [3.0]})
        self.wanted = {"a": torch.arange(64), "b": torch.randn(8, 8)}
        save_kept(self.tensors, self.wanted, "pdtrim.fuzz/1", SETTINGS, {"step": 3})
        self.data = {path: path.read_bytes() for path in (self.cell, self.tensors)}

    def _once(self, make):
        return once(self.cell, dict[str, list[float]], SETTINGS, make)

    def __call__(self, rng):
        path = rng.choice(list(self.data))
        kinds = (damaged, damaged_json) if path.suffix == ".json" else (damaged,)
        data = rng.choice(kinds)(self.data[path], rng)
        yield data
        path.write_bytes(data)
        if path == self.cell:
            same(self._once(dict), {"kl": [0.1, 0.2], "name": [3.0]})
        else:
            state, tensors = load_kept(path, "pdtrim.fuzz/1", SETTINGS, dict[str, int])
            same(state, {"step": 3})
            equal(tensors, self.wanted)


class Results:
    """Result files of eval, sweep and compare."""

    share = 6

    def __init__(self, folder):
        self.path = folder / "result.json"
        own = REPOSITORY / "benchmarks"
        self.kinds = {
            Result: (own / "kv_smollm2_202611" / "result.json").read_bytes(),
            Comparison: (own / "compare_smollm2_202611" / "33" / "result.json").read_bytes(),
        }
        for kind, data in self.kinds.items():
            self.path.write_bytes(data)
            kind.load(self.path)

    def __call__(self, rng):
        kind = rng.choice(list(self.kinds))
        data = rng.choice((damaged, damaged_json))(self.kinds[kind], rng)
        yield data
        self.path.write_bytes(data)
        kind.load(self.path)


class Texts:
    """Calibration texts of every form, and prompts."""

    share = 20

    def __init__(self, folder):
        self.folder, self.tokenizer = folder, words()
        texts = ["w1 w2 w3", "w4\nw5", "[/INST] w6", "Grüße, 世界", '"quoted", w7']
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        table = io.StringIO()
        csv.writer(table).writerows([["id", "text"], *([str(i), t] for i, t in enumerate(texts))])
        self.files = {
            "a.txt": "\n\n".join(texts).encode(),
            "a.jsonl": lines.encode(),
            "a.JSON": json.dumps([{"text": text} for text in texts]).encode(),
            "a.csv": table.getvalue().encode(),
            "a.jsonl.gz": gzip.compress(lines.encode()),
        }

    def __call__(self, rng):
        name = rng.choice(list(self.files))
        kinds = (damaged, damaged_json) if name == "a.JSON" else (damaged,)
        data = rng.choice(kinds)(self.files[name], rng)
        yield name.encode() + b"\n" + data
        path = self.folder / name
        path.write_bytes(data)
        for text in read_documents(str(path)):
            encode(self.tokenizer, text, 64)
            clean(text).encode()  # no half surrogate goes on


class Requests:
    """Logs of requests, of both forms; a line that is none is passed over."""

    share = 10

    def __init__(self, folder):
        self.path, self.tokenizer = folder / "requests.log", words()
        rows = [
            {"prompt": "w1 w2 Grüße", "answer": "w3", "time": 1764230400.5, "id": "r1"},
            {"prompt": [3, 4, 5], "answer": [6], "time": "2026-11-27T10:00:00Z"},
        ]
        vllm = (
            "DEBUG 11-27 15:19:48 [logger.py:55] Request cmpl-a-0 details: prompt: None,"
            " prompt_token_ids: [56, 51], prompt_embeds shape: None."
        )
        self.data = "".join(f"{json.dumps(row)}\n" for row in rows).encode() + f"{vllm}\n".encode()

    def __call__(self, rng):
        data = damaged(self.data, rng)
        yield data
        self.path.write_bytes(data)
        for request in RequestLog(self.path).read(last=True):
            for part in (request and request.prompt, request and request.answer):
                if isinstance(part, str):
                    encode(self.tokenizer, part, 64)
                elif part is not None:
                    same(all(type(i) is int and i >= 0 for i in part), True)


class Policies:
    """KV policies, codecs and budgets as a user writes them."""

    share = 15
    TEXTS = (
        "full+int4:group=64,rotate=true",
        "streaming:first=4,last=256+fp8",
        "snapkv:share=0.5,window=16+entropy:k_step=0.4",
        "budget:compression=5.25,codecs=packed",
        "first_last:first=4,last=9,layers=2+lossless",
    )

    def __call__(self, rng):
        data = damaged(rng.choice(self.TEXTS).encode(), rng)
        yield data
        text = data.decode("utf-8", "surrogateescape")
        with contextlib.suppress(PdtrimError):
            codec = parse_codec(text)
            same(codec.model_validate(codec.model_dump()), codec)
        policy = parse_policy(text)
        same(parse_policy(policy.text), policy)

    def __init__(self, folder):
        for text in self.TEXTS:
            parse_policy(text)


TARGETS = (
    Frames,
    Plans,
    Blocks,
    Pairs,
    Models,
    Ggufs,
    Journals,
    Kept,
    Results,
    Texts,
    Requests,
    Policies,
)


def words():
    """A tokenizer of 64 words."""
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@contextlib.contextmanager
def limited():
    """Turn a hang into an error."""

    def ring(*_):
        raise HangError(f"still at work after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_one(target, seed):
    """One input of a target: its bytes, what came of it, and the error if it is one of ours to fix.

    Returns:
        (bytes, "refused" or "read", None), or (bytes, "failed", traceback).
    """
    steps = target(random.Random(seed))
    data = next(steps)
    try:
        with limited():
            next(steps, None)
    except PdtrimError as error:
        text = str(error)
        if text.isprintable() and len(text) < 1100:
            return data, "refused", None
        return data, "failed", f"an error of more than a line: {text[:2000]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return data, "failed", traceback.format_exc()
    return data, "read", None


def fuzz(inputs, seed, *, names=(), failures=None, say=print):
    """Try so many inputs over all targets; returns counts by target and the failures."""
    folder = Path(tempfile.mkdtemp(prefix="pdtrim-fuzz-"))
    counts, failed = {}, []
    kinds = [kind for kind in TARGETS if not names or kind.__name__.lower() in names]
    shares = sum(kind.share for kind in kinds)
    try:
        for kind in kinds:
            place = folder / kind.__name__.lower()
            place.mkdir()
            target, count = kind(place), collections.Counter()
            started = time.perf_counter()
            for i in range(max(1, round(inputs * kind.share / shares))):
                at = f"{kind.__name__.lower()}-{seed}-{i}"
                data, outcome, problem = try_one(target, at)
                count[outcome] += 1
                if problem is not None:
                    failed.append((at, problem))
                    say(f"{at}: {problem}")
                    if failures is not None:
                        failures.mkdir(parents=True, exist_ok=True)
                        (failures / at).write_bytes(data)
            counts[kind.__name__.lower()] = count
            say(
                f"{kind.__name__:10}{count.total():7} inputs {count['refused']:7} refused"
                f" {count['read']:6} read {count['failed']:4} failed"
                f" {time.perf_counter() - started:7.1f} s"
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts, failed


def main():
    """Fuzz, and exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets, comma separated")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    names = tuple(filter(None, options.only.split(",")))
    counts, failed = fuzz(
        options.inputs, options.seed, names=names, failures=REPOSITORY / "out" / "fuzz"
    )
    total = sum(count.total() for count in counts.values())
    print(f"{total} inputs, {len(failed)} failed; seed {options.seed}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
