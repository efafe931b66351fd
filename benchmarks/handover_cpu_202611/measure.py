"""The embedded runtime's handover behind prefill and beside it, in one run.

    python measure.py -o result.json [--tokens 500 1000] [--rounds 5] [--gbit 0 0.5]

Two sessions of each pair, one that hands over behind prefill's last layer and one beside prefill,
take turns, prompt by prompt; both must generate the same tokens. With ``--gbit`` a thread between
the stages passes bytes on at that rate. Prompts are random token ids.
"""

import argparse
import json
import random
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

from pdtrim.bundle import TrimPlan
from pdtrim.kv.codecs import parse_codec
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates, LayerKV, Provenance, PrunePlan
from pdtrim.runtime.session import Session
from pdtrim.versions import host, versions

CHUNK = 1 << 16


def pass_on(source, target, bytes_per_s):
    """Forward a stream at a rate, counted in bytes; a break in it earns no credit."""
    free_at = time.monotonic()
    while data := source.recv(CHUNK):
        free_at = max(free_at, time.monotonic()) + len(data) / bytes_per_s
        time.sleep(max(0.0, free_at - time.monotonic()))
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


class Paced(Session):
    """A session whose link has a rate, both ways; 0 is that of the socket."""

    gbit = 0.0

    def _link(self):
        if not self.gbit:
            return super()._link()
        (prefill, here), (there, decode) = socket.socketpair(), socket.socketpair()
        for ends in ((here, there), (there, here)):
            threading.Thread(target=pass_on, args=(*ends, self.gbit * 1e9 / 8), daemon=True).start()
        return prefill, decode


def plan_of(model, codec):
    """Everything runs and travels, in a codec."""
    told = Provenance(
        method="none", mode="projected", seed=0, calibration="none",
        calibration_hash="0" * 64, search_block_tokens=0,
    )  # fmt: skip
    rules = (LayerKV(codec=parse_codec(codec)),) * model.num_layers
    gates = Gates.dense(model.num_layers).without_dead_work()
    return PrunePlan(model=model.ref, gates=gates, kv=rules, block_size=1, provenance=told)


def spread(values):
    """In ms."""
    ms = [round(1000 * value, 1) for value in values]
    return {"median": round(statistics.median(ms), 1), "least": min(ms), "most": max(ms)}


def compare(folder, vocab_size, options, gbit):
    """Rows of one pair over one link."""
    rows = []
    with Paced(folder, overlap=False) as blocking, Paced(folder) as beside:
        sessions = {"blocking": blocking, "overlapped": beside}
        for session in sessions.values():
            session.gbit = gbit
        for tokens in options.tokens:
            rng = random.Random(tokens)
            seen = {name: [] for name in sessions}
            for number in range(options.rounds + 1):
                prompt = [rng.randrange(vocab_size) for _ in range(tokens if number else 64)]
                made = {}
                for name, session in sessions.items():
                    made[name] = session.generate([prompt], max_new_tokens=4, stop_ids=[])[0]
                    if number:  # the first one warms up
                        seen[name].append((made[name], session.timing))
                assert made["blocking"].tokens == made["overlapped"].tokens
            for name, runs in seen.items():
                prefill = [timing.prefill_s for _, timing in runs]
                exposed = [one.exposed_handover for one, _ in runs]
                both = [a + b for a, b in zip(prefill, exposed, strict=True)]
                rows.append(
                    {"tokens": tokens, "link_gbit_s": gbit or None, "handover": name,
                     "kv_bytes": runs[0][0].kv_bytes, "exposed_ms": spread(exposed),
                     "prefill_ms": spread(prefill), "both_ms": spread(both)}
                )  # fmt: skip
    return rows


def main():
    """Measure, write and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--codecs", nargs="+", default=["raw", "int4", "entropy"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[500])
    parser.add_argument("--gbit", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, rows = load_model(options.model, dtype="bfloat16"), []
    for codec in options.codecs:
        with tempfile.TemporaryDirectory() as folder:
            pair = TrimPlan(plan=plan_of(model, codec)).export(model, Path(folder) / "pair")
            for gbit in options.gbit:
                for row in compare(pair, int(model.config.vocab_size), options, gbit):
                    rows.append({"codec": codec, **row})
                    print(json.dumps(rows[-1]), flush=True)
    told = {"model": options.model, "dtype": "bfloat16", "rounds": options.rounds}
    report = {**told, "host": host(), "versions": versions(), "rows": rows}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
