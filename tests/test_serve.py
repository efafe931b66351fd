"""Serving on vLLM: the commands, what is refused, and the verb. No vLLM here."""

import itertools
import os
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import first_last
from pdtrim.cli import app, main
from pdtrim.engines import ports
from pdtrim.engines.config import ServeConfig
from pdtrim.engines.ports import free_port
from pdtrim.engines.vllm import launch
from pdtrim.engines.vllm.launch import check_runnable, processes
from pdtrim.errors import ModelError, PdtrimError, PlanError
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.selectors import SnapKV
from pdtrim.plan import Gates, LayerKV
from pdtrim.runtime.start import python_module
from pdtrim.verbs import serve as serve_verb
from serving import commands, export_tiny, flags

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Prefill skips a block, decode is whole."""
    return export_tiny(tmp_path_factory.mktemp("serve") / "pair")


@pytest.fixture(autouse=True)
def no_gpus_unless_asked(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# the commands


def test_servers_come_first_and_each_stage_gets_its_own_settings(pair):
    started = commands(pair)
    assert [p.name for p in started] == ["prefill 0", "decode 0", "router"]
    prefill, decode = (flags(p.command) for p in started[:2])
    module = python_module("vllm.entrypoints.openai.api_server")
    assert started[0].command[: len(module)] == module
    assert prefill["--model"] == [str(pair / "prefill")]
    assert decode["--model"] == [str(pair / "decode")]
    assert "--tensor-parallel-size" not in {*prefill, *decode}
    for one in (prefill, decode):
        assert one["--served-model-name"] == ["tiny-llama"] and one["--block-size"] == ["32"]
        # the decode checkpoint is of whole blocks and names the plain class
        assert one["--hf-overrides"] == [{"architectures": ["PDTrimLlamaForCausalLM"]}]
        assert "--max-model-len" not in one
    assert not {"--enforce-eager"} & {*prefill, *decode}
    assert prefill["--kv-transfer-config"] == [
        {
            "kv_connector": "PDTrimConnector",
            "kv_connector_module_path": "pdtrim.engines.vllm.connector",
            "kv_role": "kv_producer",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"local_prefill": "refuse"},
        }
    ]
    assert decode["--kv-transfer-config"][0]["kv_role"] == "kv_consumer"


def test_options_reach_the_commands(pair):
    started = commands(
        pair, name="m", block_size=64, max_model_len=256, local_prefill="count",
        staged_prompts=2,
        prefill_args=("--seed", "3"), decode_args=("--dtype=float32",),
    )  # fmt: skip
    prefill, decode = (flags(p.command) for p in started[:2])
    for one in (prefill, decode):
        assert one["--served-model-name"] == ["m"] and one["--block-size"] == ["64"]
        assert one["--max-model-len"] == ["256"]
        transfer = one["--kv-transfer-config"][0]
        assert transfer["kv_connector_extra_config"] == {
            "local_prefill": "count",
            "staged_prompts": 2,
        }
    assert started[0].command[-2:] == ("--seed", "3")
    assert started[1].command[-1] == "--dtype=float32"


def test_the_router_knows_every_server_and_no_two_listen_on_one_port(pair):
    ports = iter([9000, 9001, 9001, 8000, *range(9002, 9020)])
    config = ServeConfig(pair=pair, prefill_replicas=2, decode_replicas=3, host="0.0.0.0")
    *servers, router = processes(config, free_port=lambda: next(ports))
    given = flags(router.command)
    urls = {stage: [s.url for s in servers if s.name.startswith(stage)] for stage in ("p", "d")}
    assert (given["--prefill"], given["--decode"]) == (urls["p"], urls["d"])
    assert len(urls["p"]) == 2 and len(urls["d"]) == 3
    assert "--vllm-pd-disaggregation" in given and given["--policy"] == ["round_robin"]
    # only the router is open to other machines
    assert given["--host"] == ["0.0.0.0"] and router.url == "http://127.0.0.1:8000"
    assert all(flags(s.command)["--host"] == ["127.0.0.1"] for s in servers)
    used = ["8000", *given["--prometheus-port"]]
    for server in servers:
        used += flags(server.command)["--port"]
        used.append(server.env["VLLM_NIXL_SIDE_CHANNEL_PORT"])
        assert server.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"
        assert server.url.endswith(":" + flags(server.command)["--port"][0])
    assert len(set(used)) == len(used) == 2 + 2 * 5


def test_every_server_has_a_gpu_of_its_own_unless_the_user_chose(pair, monkeypatch):
    assert all("CUDA_VISIBLE_DEVICES" not in p.env for p in commands(pair))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    *servers, router = commands(pair, decode_replicas=2)
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in servers] == ["0", "1", "2"]
    assert "CUDA_VISIBLE_DEVICES" not in router.env
    with pytest.raises(PdtrimError, match="4 servers need a GPU each and there are 3: use fewer"):
        commands(pair, prefill_replicas=2, decode_replicas=2)
    with pytest.raises(PdtrimError, match="2 servers need 2 GPUs each and there are 3"):
        commands(pair, tensor_parallel=2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 6)
    *servers, _ = commands(pair, decode_replicas=2, tensor_parallel=2)
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in servers] == ["0,1", "2,3", "4,5"]
    assert all(flags(s.command)["--tensor-parallel-size"] == ["2"] for s in servers)
    assert serve_verb._devices(servers) == ("cuda:0", "cuda:2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert all("CUDA_VISIBLE_DEVICES" not in p.env for p in commands(pair, decode_replicas=9))


def test_the_plans_pages_are_the_engines(tmp_path):
    kv = (LayerKV(), first_last(16, 32), LayerKV(), LayerKV())
    folder = export_tiny(tmp_path / "pair", kv=kv, block_size=16)
    assert flags(commands(folder)[0].command)["--block-size"] == ["16"]


@pytest.mark.parametrize(
    "rule, options, shared",
    [
        (LayerKV(), {}, True),
        (LayerKV(), {"local_prefill": "count"}, False),
        (LayerKV(codec=parse_codec("lossless")), {}, False),
        (first_last(32, 32), {}, False),
    ],
)
def test_decode_has_a_prefix_cache_where_pages_mean_the_same_in_every_prompt(
    tmp_path, rule, options, shared
):
    kv = (LayerKV(), rule, LayerKV(), LayerKV())
    folder = export_tiny(tmp_path / "pair", kv=kv, block_size=32)
    prefill, decode, _ = commands(folder, decode_args=("--seed", "3"), **options)
    assert "--no-enable-prefix-caching" not in prefill.command
    assert ("--no-enable-prefix-caching" not in decode.command) == shared
    assert decode.command[-2:] == ("--seed", "3")


REFUSED = {
    "exact to the token": (
        {"kv": (first_last(4, 8), *[LayerKV()] * 3)},
        "plan again with --block-size 32",
    ),
    "other pages": (
        {"kv": (first_last(4, 8), *[LayerKV()] * 3), "block_size": 16},
        "plan again with --block-size 32",
    ),
    "selector": (
        {"kv": (LayerKV(selector=SnapKV()), *[LayerKV()] * 3), "block_size": 32},
        "layer 0: .*'snapkv'.*first_last",
    ),
    "family": ({"family": "mistral"}, "family 'mistral' is not served"),
    "heads": (
        {"kv": (LayerKV(codec=parse_codec("int4")), *[LayerKV()] * 3)},
        "codecs of 2 KV heads in tensor parallel 4: use a size that divides 2",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_vllm_cannot_serve_is_refused(tmp_path, what):
    made, words = REFUSED[what]
    folder = export_tiny(tmp_path / "pair", **made)
    with pytest.raises(PlanError, match=words) as error:
        commands(folder, block_size=32, tensor_parallel=4)
    assert "\n" not in str(error.value)


def test_a_rule_of_a_layer_that_does_not_travel_is_no_matter(tmp_path):
    kv = (LayerKV(), LayerKV(selector=SnapKV()), LayerKV(), LayerKV())
    folder = export_tiny(tmp_path / "pair", gates=Gates.removing(4, decode={1}), kv=kv)
    assert len(commands(folder)) == 3


def test_two_stages_of_different_plans_are_refused(pair, tmp_path):
    other = export_tiny(tmp_path / "other", gates=Gates.dense(4))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "prefill").symlink_to(pair / "prefill")
    (mixed / "decode").symlink_to(other / "decode")
    with pytest.raises(PlanError, match="different plans"):
        commands(mixed)
    with pytest.raises(ModelError, match="no prefill checkpoint"):
        commands(tmp_path)


@pytest.mark.parametrize(
    "option",
    [
        {"prefill_replicas": 0}, {"decode_replicas": 0}, {"block_size": 0}, {"max_model_len": 0},
        {"port": 0}, {"port": 65536}, {"start_seconds": 0}, {"local_prefill": "maybe"},
        {"staged_prompts": 0}, {"tensor_parallel": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_named(option):
    with pytest.raises(PdtrimError, match=next(iter(option))):
        ServeConfig(pair=Path("pair"), **option)


def test_what_is_missing_here_is_said_before_anything_starts(pair, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServeConfig(pair=pair, port=taken.getsockname()[1])
        for spec, router in ((None, "vllm-router"), (object(), None)):
            monkeypatch.setattr(launch, "find_spec", lambda name, spec=spec: spec)
            monkeypatch.setattr(launch, "find_router", lambda router=router: router)
            with pytest.raises(PdtrimError, match=re.escape("pip install 'pdtrim[vllm]'")):
                check_runnable(config)
            done = CliRunner().invoke(app, ["serve", str(pair)])
            assert "pdtrim[vllm]" in str(done.exception)
        monkeypatch.setattr(launch, "find_router", lambda: "vllm-router")
        with pytest.raises(PdtrimError, match=r"cannot listen on .*in use.*give another --port"):
            check_runnable(config)
    check_runnable(config)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_altered_weights_are_not_served(tmp_path, monkeypatch, stage):
    pair = export_tiny(tmp_path / "pair")
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    monkeypatch.setattr(launch, "find_router", lambda: "vllm-router")
    weights = pair / stage / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 4
    weights.write_bytes(data)
    with pytest.raises(ModelError, match=rf"{stage}/model\.safetensors is not the file"):
        check_runnable(ServeConfig(pair=pair, port=free_port()))


def test_the_router_is_found_beside_python_before_the_path(tmp_path, monkeypatch):
    for place in ("bin", "path"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "vllm-router").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert launch.find_router() == str(tmp_path / "bin" / "vllm-router")
    (tmp_path / "bin" / "vllm-router").unlink()
    assert launch.find_router() == str(tmp_path / "path" / "vllm-router")
    (tmp_path / "path" / "vllm-router").unlink()
    assert launch.find_router() is None


# the verb


def test_a_dry_run_prints_lines_for_a_shell_and_needs_no_vllm(pair, monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    monkeypatch.setattr(launch, "find_router", lambda: None)
    args = ["--dry-run", "--decode-arg", "--override", "--decode-arg", "a b", "--port", "8123"]
    done = CliRunner().invoke(app, ["serve", str(pair), *args])
    assert done.exit_code == 0, done.output
    lines = [shlex.split(line) for line in done.output.splitlines()]
    assert len(lines) == 3
    for words in lines[:2]:
        assert re.fullmatch("VLLM_NIXL_SIDE_CHANNEL_HOST=127.0.0.1", words[0])
        assert re.fullmatch("VLLM_NIXL_SIDE_CHANNEL_PORT=[0-9]+", words[1])
        assert words[2] == f"{launch.READS_BY_COPY}=on" and words[3] == sys.executable
        assert flags(words)["--kv-transfer-config"][0]["kv_connector"] == "PDTrimConnector"
    assert lines[1][-2:] == ["--override", "a b"]
    assert lines[2][0] == "vllm-router" and flags(lines[2])["--port"] == ["8123"]


SERVER = """
import os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/metrics":
            self.wfile.write(b'vllm:cache_config_info{block_size="32",num_gpu_blocks="33"} 1.0')
        if "--vllm-pd-disaggregation" in sys.argv:
            os.kill(int(os.environ["SUPERVISOR"]), signal.SIGINT)

at = {flag: sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port")}
print("[/x] listens", flush=True)
HTTPServer((at["--host"], int(at["--port"])), Handler).serve_forever()
"""


def test_the_verb_serves_until_ctrl_c(pair, tmp_path, monkeypatch):
    """With a package ``vllm`` and a router made here; the router sends the Ctrl-C."""
    module = tmp_path / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    module.write_text(SERVER)
    router = tmp_path / "vllm-router"
    router.write_text(f"#!{sys.executable}\n{SERVER}")
    router.chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SUPERVISOR", str(os.getpid()))
    monkeypatch.setattr(launch, "find_router", lambda: str(router))
    port = str(free_port())
    words = ["serve", str(pair), "--port", port, "--max-model-len", "512", "--no-probe"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    assert done.stdout == f"OpenAI endpoint: http://127.0.0.1:{port}/v1\n"
    assert "prefill 0 | [/x] listens\n" in done.stderr
    assert "warning: decode 0: 32 pages, 2.0 of the longest requests: it will" in done.stderr
    assert "(512 tokens, 16 pages without a hole)\n" in done.stderr
    assert "measured" not in done.stderr
    assert done.stderr.endswith("stopped\n")


def test_help_has_an_example():
    assert "Example: pdtrim serve" in CliRunner().invoke(app, ["serve", "--help"]).output


def test_an_error_is_one_line_even_with_brackets_in_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pdtrim", "serve", "[/x]"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: no prefill checkpoint at [/x]/prefill")


def test_ports_are_none_that_outgoing_connections_get(tmp_path, monkeypatch):
    """Two processes of neighbouring numbers, one port that somebody listens on; no room at all."""
    given = tmp_path / "range"
    monkeypatch.setattr(ports, "GIVEN", given)
    given.write_text("32768\t60999\n")
    monkeypatch.setattr(ports, "_offers", itertools.count())
    first = [free_port() for _ in range(20)]
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    monkeypatch.setattr(ports, "_offers", itertools.count())
    second = [free_port() for _ in range(20)]
    assert len({*first, *second}) == 40 and max(*first, *second) < 32768
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", second[0]))
        monkeypatch.setattr(ports, "_offers", itertools.count())
        assert free_port() == second[1]
    given.write_text("1024\t65535\n")
    assert free_port() >= 1024
