"""What ``make fuzz`` damages: everything that pdtrim reads, each as a user's run reads it.

A target makes its sound input once. Called with a source of chance, it yields damaged bytes, and
then reads them. For what carries a hash (frames, ranges, pairs, blocks, journals, kept files) a
result must be what was written, bit by bit: anything else is a change that was accepted.
"""

import json
import socket
from pathlib import Path

import torch

from gguf_files import write_gguf
from helpers import export, first_last, frame_of, make_plan, tiny_model, words
from mutations import damaged, damaged_json
from pdtrim.bundle import TrimPlan
from pdtrim.engines.ranges import Form
from pdtrim.errors import WireError
from pdtrim.evaluate.compare.records import Comparison
from pdtrim.evaluate.result import Result
from pdtrim.exported import check_base, load_pair
from pdtrim.keep.journal import Journal
from pdtrim.keep.store import once
from pdtrim.keep.tensors import load_kept, save_kept
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.frame import Layout, SentLayer, check_opening
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.wire import FrameReader
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates, LayerKV, PrunePlan

REPOSITORY = Path(__file__).parent.parent
SETTINGS = {"model": "m", "seed": 1}


class AcceptedError(AssertionError):
    """A damaged payload was taken for a sound one."""


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


def one_damaged(files, rng):
    """One of some files and its bytes, damaged; of JSON also in what it says."""
    path = rng.choice(list(files))
    kinds = (damaged, damaged_json) if path.suffix == ".json" else (damaged,)
    return path, rng.choice(kinds)(files[path], rng)


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
            self.frames.append(frame_of(layout, bytes(16), layers))
        self.form = Form.of(self.plans[0], torch.bfloat16, 22, 8)
        room = torch.zeros(self.form.most, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(2)
        kept = [
            ([torch.randn(2, 2, part.tokens, 8, generator=generator).bfloat16().unbind()], None)
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
            for parts, data in self.form.read(staged[: self.form.most], bytes(16)):
                for part, row in zip(parts, data, strict=True):
                    part.decode(row)
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
            check_opening(opening, layout)
            if opening.more:
                raise WireError("another head should follow")
            for entry in layout.entries:
                reader.part(entry, layout).decode()
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
        files = sorted(path for path in self.folder.rglob("*.*") if path.is_file())
        self.data = {path: path.read_bytes() for path in files}
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
        path, data = one_damaged(self.data, rng)
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
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        self.data = {path: path.read_bytes() for path in files}

    def __call__(self, rng):
        path, data = one_damaged(self.data, rng)
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
)
