"""The deploy files run what ``pdtrim serve`` runs. No vLLM here."""

import dataclasses
import re
from pathlib import Path

import pytest
import typer

from helpers import first_last
from pdtrim.cli import app
from pdtrim.plan import LayerKV
from pdtrim.runtime.start import python_module
from pdtrim.verbs.watch import WatchConfig
from serving import commands, export_tiny, flags

DEPLOY = Path(__file__).parents[1] / "deploy"

PLACES = {"--host", "--port", "--model", "--prefill", "--decode"}
PLACES |= {"--prometheus-host", "--prometheus-port"}


def without_places(command):
    return {flag: values for flag, values in flags(command).items() if flag not in PLACES}


def module_of(process):
    """The module that a server's command runs."""
    return process.command[len(python_module("")) - 1]


def expanded(words, pattern, values):
    return [re.sub(pattern, lambda m: values(*m.groups()), word) for word in words]


def read_yaml(pattern):
    yaml = pytest.importorskip("yaml")
    files = sorted(DEPLOY.glob(pattern))
    return [item for file in files for item in yaml.safe_load_all(file.read_text())]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Prefill skips a block, decode is whole; a rule drops tokens: the files are for any plan."""
    kv = (LayerKV(), first_last(32, 32), LayerKV(), LayerKV())
    return export_tiny(tmp_path_factory.mktemp("deploy") / "pair", kv=kv, block_size=32)


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture(scope="module")
def manifests():
    found = read_yaml("kubernetes/*.yaml")
    return {(i["kind"], i.get("metadata", {}).get("name")): i for i in found}


def test_compose_runs_what_serve_runs(pair):
    compose = read_yaml("docker-compose.yaml")[0]["services"]
    urls = {}
    for process in commands(pair, name="pair"):
        stage = process.name.split()[0]
        service = compose[stage]
        words = expanded(service["command"], r"\$\{\w+:-([^}]*)\}", lambda default: default)
        assert without_places(words) == without_places(process.command)
        given = flags(words)
        urls[stage] = "http://{}:{}".format(*given["--host"], *given["--port"])
        assert f'"{urls[stage]}{process.health}"' in service["healthcheck"]["test"][-1]
        assert service["image"] == "${IMAGE:-pdtrim-vllm}" and service["network_mode"] == "host"
        if stage == "router":
            assert (given["--prefill"], given["--decode"]) == ([urls["prefill"]], [urls["decode"]])
            assert {d["condition"] for d in service["depends_on"].values()} == {"service_healthy"}
        else:
            assert service["entrypoint"] == ["python3", "-P", "-m", module_of(process)]
            assert given["--model"] == [f"/pair/{stage}"]
            assert service["environment"].keys() >= process.env.keys()
            assert [v.rsplit(":", 2)[1:] for v in service["volumes"]] == [["/pair", "ro"]]
    for number, stage in enumerate(("prefill", "decode")):
        service = compose[stage]
        assert service["environment"]["VLLM_NIXL_SIDE_CHANNEL_PORT"] == str(5600 + number)
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == [str(number)]


def test_the_watch_is_the_verb_with_options_that_it_has():
    """Its arguments become the record, which accepts them, and its port is the pod's."""
    (found,) = read_yaml("watch/watch.yaml")[0]["spec"]["template"]["spec"]["containers"]
    assert found["command"] == ["python3", "-P", "-m", "pdtrim"]
    verb, pair, log, *words = found["args"]
    command = typer.main.get_command(app).commands[verb]
    given = command.make_context(verb, [pair, log, *words]).params
    fields = {field.name for field in dataclasses.fields(WatchConfig)}
    config = WatchConfig(**{name: value for name, value in given.items() if name in fields})
    config.check()
    assert (str(given["target"]), str(given["log"])) == (pair, log) and not given["once"]
    mounts = {mount["mountPath"] for mount in found["volumeMounts"]}
    assert {pair, str(Path(log).parent), config.model} < mounts
    (port,) = found["ports"]
    assert port["containerPort"] == config.port
    assert config.host == "0.0.0.0", "its pod alone; the policy says who comes"
    for probe in ("startupProbe", "readinessProbe"):
        assert found[probe]["httpGet"] == {"path": "/metrics", "port": port["name"]}


def test_kubernetes_runs_what_serve_runs(manifests, pair):
    values = manifests["ConfigMap", "pdtrim-pair"]["data"]
    options = {"name": values["NAME"], "block_size": int(values["BLOCK_SIZE"])}
    for process in commands(pair, **options):
        name = process.name.split()[0]
        pod = manifests["Deployment", f"pdtrim-{name}"]["spec"]["template"]["spec"]
        (found,) = pod["containers"]
        words = expanded(found["args"], r"\$\((\w+)\)", values.__getitem__)
        assert without_places(words) == without_places(process.command)
        ports = {p["name"]: p["containerPort"] for p in found["ports"]}
        assert flags(words)["--port"] == [str(ports["http"])]
        for probe in ("startupProbe", "readinessProbe"):
            assert found[probe]["httpGet"] == {"path": process.health, "port": "http"}
        if name == "router":
            given = flags(words)
            for stage in ("prefill", "decode"):
                (port,) = manifests["Service", f"pdtrim-{stage}"]["spec"]["ports"]
                assert given[f"--{stage}"] == [f"http://pdtrim-{stage}:{port['port']}"]
            continue
        assert found["command"] == ["python3", "-P", "-m", module_of(process)]
        assert flags(words)["--model"] == [f"/pair/{name}"]
        assert found["envFrom"] == [{"configMapRef": {"name": "pdtrim-pair"}}]
        env = {e["name"]: e for e in found["env"]}
        assert env.keys() >= process.env.keys()
        host = env["VLLM_NIXL_SIDE_CHANNEL_HOST"]
        assert host["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
        assert env["VLLM_NIXL_SIDE_CHANNEL_PORT"]["value"] == str(ports["nixl"])
        assert found["resources"]["limits"]["nvidia.com/gpu"] == "1"
        mount = next(m for m in found["volumeMounts"] if m["mountPath"] == "/pair")
        assert mount["readOnly"] is True
        volume = next(v for v in pod["volumes"] if v["name"] == mount["name"])
        assert volume["persistentVolumeClaim"]["readOnly"] is True
