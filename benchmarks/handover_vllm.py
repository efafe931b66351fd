"""One handover after another: vLLM's own NIXL connector on the dense model, and ours on pairs.

    python benchmarks/handover_vllm.py DENSE_MODEL PAIR... -o result.json

All servers run at once and take turns, prompt by prompt. Bytes, descriptors and times are
those of NIXL's own counters on the decode servers. Prompts are random token ids.
"""

import argparse
import json
import os
import random
import urllib.request
import uuid
from dataclasses import replace
from pathlib import Path

from servers import counters, running

from pdtrim.engines.config import ServeConfig
from pdtrim.engines.ports import free_port
from pdtrim.engines.vllm.launch import processes
from pdtrim.versions import host, versions


def stock(process, model):
    """The same server with vLLM's connector and the dense model."""
    words = list(process.command)
    words[words.index("--model") + 1] = str(model)
    at = words.index("--hf-overrides")
    del words[at : at + 2]
    at = words.index("--kv-transfer-config") + 1
    settings = json.loads(words[at])
    del settings["kv_connector_module_path"], settings["kv_connector_extra_config"]
    words[at] = json.dumps(settings | {"kv_connector": "NixlConnector"})
    return replace(process, command=tuple(words))


def post(url, body, request_id):
    """The answer to one completion request."""
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def hand_over(prefill, decode, prompt):
    """One prompt through both stages."""
    request_id = str(uuid.uuid4())
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    ahead = {"do_remote_decode": True, "do_remote_prefill": False}
    made = post(prefill, {**body, "kv_transfer_params": ahead}, request_id)
    post(decode, {**body, "kv_transfer_params": made["kv_transfer_params"]}, request_id)


def measure(urls, lengths, repeats, vocab):
    """By prompt length and connector: means of one handover."""
    rng = random.Random(0)
    for prefill, decode in urls.values():  # the handshake is not a handover
        hand_over(prefill, decode, [rng.randrange(vocab) for _ in range(64)])
    rows = []
    for length in lengths:
        before = {name: counters(decode) for name, (_, decode) in urls.items()}
        for _ in range(repeats):
            prompt = [rng.randrange(vocab) for _ in range(length)]
            for prefill, decode in urls.values():
                hand_over(prefill, decode, prompt)
        for name, (_, decode) in urls.items():
            after = counters(decode)
            made = {key: (after[key] - before[name][key]) / repeats for key in after}
            assert made.pop("handovers") == 1
            rows.append({"prompt_tokens": length, "connector": name, **made})
    return rows


def main():
    """Start the servers and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--lengths", default="128,512,1024,2048")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--vocab", type=int, default=1000)
    options = parser.parse_args()
    args = ("--enforce-eager",)
    servers, urls = [], {}
    for pair in (None, *options.pairs):
        config = ServeConfig(
            pair=pair or options.pairs[0],
            port=free_port(),
            name="m",
            prefill_args=args,
            decode_args=args,
        )
        made = processes(config, free_port=free_port)[:2]
        if pair is None:
            made = [stock(process, options.dense) for process in made]
        name = pair.name if pair else "stock"
        servers += [replace(process, name=f"{name} {process.name}") for process in made]
        urls[name] = tuple(process.url for process in made)
    lengths = [int(x) for x in options.lengths.split(",")]
    with running(servers, Path(os.devnull), 900):
        rows = measure(urls, lengths, options.repeats, options.vocab)
    made = {"versions": versions(), "host": host(), "rows": rows}
    options.output.write_text(json.dumps(made, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
