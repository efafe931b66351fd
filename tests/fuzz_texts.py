"""What a fuzzing run damages that people write: texts, logs of requests, KV policies."""

import contextlib
import csv
import gzip
import io
import json

from fuzz_targets import same
from helpers import words
from mutations import damaged, damaged_json
from pdtrim.calibration.sources import read_documents
from pdtrim.calibration.tokens import encode
from pdtrim.errors import PdtrimError
from pdtrim.kv.codecs import parse_codec
from pdtrim.kvfit.policy import parse_policy
from pdtrim.reading.requests import RequestLog
from pdtrim.reading.text import clean


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


TEXTS = (Texts, Requests, Policies)
