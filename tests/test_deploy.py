"""What the deploy files protect; ``test_deploy_commands.py`` says what they run."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

DEPLOY = Path(__file__).parents[1] / "deploy"
ITEMS = [
    item
    for file in sorted(DEPLOY.glob("kubernetes/*.yaml")) + sorted(DEPLOY.glob("watch/*.yaml"))
    for item in yaml.safe_load_all(file.read_text())
]
DEPLOYMENTS = {i["metadata"]["name"].removeprefix("pdtrim-"): i for i in ITEMS
               if i["kind"] == "Deployment"}  # fmt: skip
POLICIES = [item["spec"] for item in ITEMS if item["kind"] == "NetworkPolicy"]
COMPOSE = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())["services"]
NAMES = ("prefill", "decode", "router")
PODS = (*NAMES, "watch")
KEY_OF = {"prefill": "VLLM_API_KEY", "decode": "VLLM_API_KEY", "router": "OPENAI_API_KEY"}


def pod_of(name):
    pod = DEPLOYMENTS[name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_restricted(name):
    """As the Pod Security Standard of that name demands, and a little more."""
    pod, container = pod_of(name)
    outer, inner = pod["securityContext"], container["securityContext"]
    assert outer["runAsNonRoot"] is True and outer["runAsUser"] == outer["fsGroup"] == 10001
    assert outer["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inner == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not any("hostPath" in volume for volume in pod["volumes"])


@pytest.mark.parametrize("name", PODS)
def test_what_a_pod_writes_has_a_bounded_place(name):
    pod, container = pod_of(name)
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    wanted = {"/tmp"} if name in ("router", "watch") else {"/tmp", "/cache", "/dev/shm"}
    assert wanted == {path for path, mount in mounts.items() if not mount.get("readOnly")}
    claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert all(claim["readOnly"] is True for claim in claims)
    assert all("sizeLimit" in volumes[mounts[path]["name"]]["emptyDir"] for path in wanted)
    home = next(e["value"] for e in container["env"] if e["name"] == "HOME")
    assert home in wanted
    for bound in ("limits", "requests"):
        assert container["resources"][bound].keys() >= {"cpu", "memory", "ephemeral-storage"}


def test_images_are_named_by_one_digest_that_must_be_filled_in():
    zeros, named = "sha256:" + "0" * 64, set()
    for folder in ("kubernetes", "watch"):
        kustomization = yaml.safe_load((DEPLOY / folder / "kustomization.yaml").read_text())
        (image,) = kustomization["images"]
        assert image["digest"] == zeros
        named.add(image["name"])
        files = {path.name for path in DEPLOY.glob(f"{folder}/*.yaml")} - {"kustomization.yaml"}
        assert set(kustomization["resources"]) == files
    (image,) = named
    for name in PODS:
        assert pod_of(name)[1]["image"] == f"{image}@{zeros}"


@pytest.mark.parametrize("name", NAMES)
def test_the_servers_ask_for_the_key_that_the_router_shows(name):
    env = {e["name"]: e for e in pod_of(name)[1]["env"]}
    secret = {"secretKeyRef": {"name": "pdtrim-api-key", "key": "key"}}
    assert env[KEY_OF[name]]["valueFrom"] == secret
    assert "${PDTRIM_API_KEY:?" in COMPOSE[name]["environment"][KEY_OF[name]]
    assert not any(item["kind"] == "Secret" for item in ITEMS), "a key in a file is no secret"


def selected(labels, selector):
    return selector["matchLabels"].items() <= labels.items()


def lets(labels, direction, other, port):
    """Whether all policies together let a pod speak, by the rules of Kubernetes."""
    own = [p for p in POLICIES if selected(labels, p["podSelector"])]
    if not any(direction in p["policyTypes"] for p in own):
        return True
    side = "from" if direction == "Ingress" else "to"
    return any(
        any(selected(other, peer["podSelector"]) for peer in rule[side] if "podSelector" in peer)
        and any(p["port"] <= port <= p.get("endPort", p["port"]) for p in rule["ports"])
        for policy in own
        for rule in policy.get(direction.lower(), [])
    )


def test_nobody_speaks_but_who_must():
    pods = {name: DEPLOYMENTS[name]["spec"]["template"]["metadata"]["labels"] for name in PODS}
    pods |= {"client": {"pdtrim-client": "true"}, "stranger": {"app": "other"}}
    ports = (22, 5600, 5601, 5699, 8000, 9109, 29000)
    found = {
        (source, target, port)
        for source, labels in pods.items()
        for target in PODS
        for port in ports
        if lets(labels, "Egress", pods[target], port)
        and lets(pods[target], "Ingress", labels, port)
    }
    assert found == {
        ("client", "router", 8000),
        ("router", "prefill", 8000),
        ("router", "decode", 8000),
        *(("decode", "prefill", port) for port in (5600, 5601, 5699)),
        *(("prefill", "decode", port) for port in (5601, 5699)),
    }
    for name in ("prefill", "watch"):
        assert not lets(pods[name], "Egress", {"app": "other"}, 443), "nothing is sent home"


def test_prometheus_finds_the_watch_and_is_let_in():
    """By both files: the policy's port is the monitor's, and the pod's."""
    kinds = {item["kind"]: item for item in ITEMS if item.get("metadata", {}).get("name") ==
             "pdtrim-watch"}  # fmt: skip
    (endpoint,) = kinds["PodMonitor"]["spec"]["podMetricsEndpoints"]
    _, container = pod_of("watch")
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    (rule,) = kinds["NetworkPolicy"]["spec"]["ingress"]
    (peer,) = rule["from"]
    assert peer.keys() == {"namespaceSelector", "podSelector"}, "both, of one peer"
    assert rule["ports"] == [{"protocol": "TCP", "port": ports[endpoint["port"]]}]
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["PodMonitor"]["spec"]["selector"]["matchLabels"] == labels
    assert kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert kinds["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert kinds["Deployment"]["spec"]["replicas"] == 1


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_ucx_listens_where_the_policy_lets_it(name):
    env = {e["name"]: e for e in pod_of(name)[1]["env"]}
    assert env["UCX_TCP_PORT_RANGE"]["value"] == "5601-5699"
    assert env["VLLM_NIXL_SIDE_CHANNEL_PORT"]["value"] == "5600"


@pytest.mark.parametrize("name", NAMES)
def test_a_container_on_one_machine_is_restricted_too(name):
    service = COMPOSE[name]
    assert service["user"] == "10001:10001" and service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory", "pids"}
    assert {"cpus", "memory"} <= service["deploy"]["resources"]["reservations"].keys()
    places = {entry.split(":")[0] for entry in service["tmpfs"]}
    assert service["environment"]["HOME"] in places
    at = service["command"].index("--host") + 1
    assert service["command"][at] == "127.0.0.1", "the host's network is shared"
    if name != "router":
        assert service["environment"]["UCX_NET_DEVICES"] == "lo"


def test_the_image_runs_as_nobody_special():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert lines[-1] == "USER 10001:10001"
    assert (
        re.fullmatch(r"ARG BASE=vllm/vllm-openai:v[\d.]+", lines[3])
        and "ENV PYTHONSAFEPATH=1" in lines
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_service_finds_its_pods(name):
    deployment = DEPLOYMENTS[name]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    (service,) = (
        i for i in ITEMS if i["kind"] == "Service" and i["metadata"]["name"] == f"pdtrim-{name}"
    )
    assert service["spec"]["selector"] == labels
    if name != "router":
        assert labels["llm-d.ai/role"] == name
