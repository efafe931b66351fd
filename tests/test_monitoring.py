"""The Prometheus rules and the Grafana dashboard: they name what exists, and say what they should.

With promtool and prometheus on the path (``apt-get install prometheus``) the rules run in the real
ones; there is no Grafana in a package registry, so that of the dashboard only the expressions do.
"""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers import make_plan
from pdtrim.bundle import TrimPlan
from pdtrim.evaluate.watch import Sample, Watch
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates
from pdtrim.report.prometheus import WatchMetrics

yaml = pytest.importorskip("yaml")

HERE = Path(__file__).parent
MONITORING = HERE.parent / "deploy" / "monitoring"
RECORDED = [HERE / "recorded" / f"{stage}.prom" for stage in ("prefill", "decode")]
SPEC = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
RULES = [rule for group in SPEC["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
PANEL_EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
ENDINGS = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
VARIABLES = {"$model_name": ".*", "$__rate_interval": "1m"}


def expanded(expression):
    """An expression as Grafana sends it."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def names_of(page):
    """Names that the samples of a page may have."""
    found = set()
    for line in page.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            base = name.removesuffix("_total") if kind == "counter" else name
            found |= {base + ending for ending in ENDINGS[kind]}
    return found


@pytest.fixture(scope="module")
def plan(tmp_path_factory, tiny_folder):
    model = load_model(str(tiny_folder), dtype="float32")
    path = tmp_path_factory.mktemp("monitoring") / "plan.json"
    make_plan(model, Gates.removing(4, prefill={1})).save(path)
    return path


@pytest.fixture(scope="module")
def known(plan, tiny_folder):
    """Names that a pair on vLLM, ``pdtrim watch`` and the rules make."""
    sampling = Sample(share=1, seed=0, per_hour=1, prompt_tokens=9, answer_tokens=9)
    model = load_model(str(tiny_folder), dtype="float32")
    watch = Watch(TrimPlan.open(plan), model, sampling, None, worse=1, false_alarms=0.1)
    pages = [*(path.read_text() for path in RECORDED), WatchMetrics(watch).text()]
    records = {rule["record"] for rule in RULES if "record" in rule}
    return set().union(*map(names_of, pages)) | records


def metrics_in(expression):
    return set(re.findall(r"\b(?:vllm|pdtrim)[:\w]+", expression))


def test_every_expression_names_metrics_that_exist(known):
    expressions = [rule["expr"] for rule in RULES] + PANEL_EXPRESSIONS
    expressions += [item["expr"] for item in DASHBOARD["annotations"]["list"]]
    expressions += [
        x["query"]["query"] for x in DASHBOARD["templating"]["list"] if x["type"] == "query"
    ]
    named = set().union(*map(metrics_in, expressions))
    assert len(named) > 30 and not named - known
    assert all(metrics_in(expression) for expression in PANEL_EXPRESSIONS)


def test_every_counter_of_ours_and_of_nixl_is_on_the_dashboard(known):
    """Or in a rule that is; what a rule or panel of a histogram shows counts as the histogram."""
    shown = set().union(*map(metrics_in, [*PANEL_EXPRESSIONS, *(rule["expr"] for rule in RULES)]))
    ours = {name for name in known if name.startswith(("pdtrim:", "vllm:nixl_"))}
    bases = {re.sub("_(bucket|sum|count|total)$", "", name) for name in ours}
    missing = {base for base in bases if not any(name.startswith(base) for name in shown)}
    assert not missing


def test_the_dashboard_is_whole():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for a, b in itertools.combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for panel in PANELS:
        assert panel["title"] and panel["datasource"]["uid"] == "${datasource}"
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_the_dashboard_is_a_config_map_that_grafanas_sidecar_takes():
    made = yaml.safe_load((MONITORING / "kustomization.yaml").read_text())
    (generated,) = made["configMapGenerator"]
    assert generated["files"] == ["dashboard.json"]
    assert generated["options"]["labels"]["grafana_dashboard"] == "1"
    assert all((MONITORING / name).is_file() for name in made["resources"])


def test_prometheus_may_read_the_servers_and_nothing_else():
    monitor, policy = yaml.safe_load_all((MONITORING / "scrape.yaml").read_text())
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"]
    (rule,) = policy["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8000}]
    (peer,) = rule["from"]
    assert peer.keys() == {"namespaceSelector", "podSelector"}, "both, of one peer"
    kubernetes = HERE.parent / "deploy" / "kubernetes"
    for stage in ("prefill", "decode"):
        deployment = next(
            item
            for item in yaml.safe_load_all((kubernetes / f"{stage}.yaml").read_text())
            if item["kind"] == "Deployment"
        )
        pod = deployment["spec"]["template"]
        assert pod["metadata"]["labels"]["llm-d.ai/role"] == stage
        ports = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
        assert ports[monitor["spec"]["podMetricsEndpoints"][0]["port"]] == 8000


promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool")


def tool(*words, cwd):
    done = subprocess.run(
        ["promtool", *words], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def rules(tmp_path):
    """A folder with what Prometheus reads."""
    (tmp_path / "pdtrim.rules.yaml").write_text(yaml.safe_dump(SPEC))
    for name in ("rules_test.yaml", "prometheus.yaml"):
        shutil.copy(MONITORING / name, tmp_path)
    return tmp_path


@promtool
def test_the_rules_do_what_their_tests_say(rules):
    tool("check", "rules", "pdtrim.rules.yaml", cwd=rules)
    tool("check", "config", "prometheus.yaml", cwd=rules)
    tool("test", "rules", "rules_test.yaml", cwd=rules)


@promtool
def test_every_alert_is_tested_for_being_silent_and_for_firing():
    tested = {}
    for test in yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]:
        for one in test["alert_rule_test"]:
            tested.setdefault(one["alertname"], set()).add(bool(one["exp_alerts"]))
    alerts = {rule["alert"] for rule in RULES if "alert" in rule}
    assert tested == {alert: {True, False} for alert in alerts}


@promtool
def test_money_is_rois_share_of_the_load(rules):
    """8,760 a year are 1 an hour, at 2 requests a second; there is 1."""
    text = (rules / "pdtrim.rules.yaml").read_text()
    for record, value in (("pdtrim:roi_saved_money_a_year", 8760), ("pdtrim:roi_rate", 2)):
        assert text.count(f"- expr: vector(NaN)\n    record: {record}\n") == 1
        text = text.replace(
            f"- expr: vector(NaN)\n    record: {record}\n",
            f"- expr: vector({value})\n    record: {record}\n",
        )
    (rules / "pdtrim.rules.yaml").write_text(text)
    series = {"series": 'pdtrim:handover_seconds_count{model_name="m"}', "values": "0+60x120"}
    wanted = {"labels": 'pdtrim:saved_money:hour{model_name="m"}', "value": 0.5}
    test = {
        "interval": "1m",
        "input_series": [series],
        "promql_expr_test": [
            {"expr": "pdtrim:saved_money:hour", "eval_time": "2h", "exp_samples": [wanted]}
        ],
    }
    made = {"rule_files": ["pdtrim.rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (rules / "money.yaml").write_text(yaml.safe_dump(made))
    tool("test", "rules", "money.yaml", cwd=rules)


@promtool
def test_the_panels_expressions_are_promql(tmp_path):
    made = [{"record": f"panel:{i}", "expr": expanded(e)} for i, e in enumerate(PANEL_EXPRESSIONS)]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"groups": [{"name": "p", "rules": made}]}))
    tool("check", "rules", "p.yaml", cwd=tmp_path)


class Pages(BaseHTTPRequestHandler):
    """The recorded pages, as the servers of a pair; their counters stand still."""

    def do_GET(self):
        page = self.server.page
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def process(*words, **how):
    started = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@contextlib.contextmanager
def recorded_servers():
    """URLs' hosts of a prefill and of a decode server."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for path in RECORDED:
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Pages))
            host = f"127.0.0.1:{server.server_port}"
            names = r"\1_" if path.stem == "decode" else r"\1:"  # as to a Prometheus before 3
            server.page = re.sub("^(vllm|pdtrim):", names, path.read_text(), flags=re.M).encode()
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            hosts.append(host)
        yield hosts


def ask(host, expression):
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://{host}/api/v1/query?{query}", timeout=30) as answer:
        made = json.load(answer)
    assert made["status"] == "success", made
    return made["data"]["result"]


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus")
def test_a_real_prometheus_reads_a_pair_and_its_watch(rules, plan, tiny_folder):
    """The drift of a log is an alert that fires, and every panel's expression is answered."""
    log, reference = rules / "log", rules / "reference.json"
    ids = [[3 + (7 * i + 5 * j) % 60 for j in range(12)] for i in range(30)]
    rows = [{"prompt": row, "time": 0} for row in ids] + [{"prompt": ids[0], "time": 3600}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    digest = TrimPlan.open(plan).plan.digest
    low = {"schema": "pdtrim.watch/1", "plan_digest": digest, "kls": [1e-4, 2e-4, 1e-4, 2e-4]}
    reference.write_text(json.dumps(low))
    watch = (sys.executable, "-m", "pdtrim", "watch", str(plan), str(log), "--share", "1")
    watch += ("--port", "0", "--reference", str(reference), "--dtype", "float32")
    with recorded_servers() as hosts, process(*watch) as watching:
        url = watching.stdout.readline().split()[-1]
        config = yaml.safe_load((rules / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        jobs = {job["job_name"]: job["static_configs"][0] for job in config["scrape_configs"]}
        jobs["vllm"]["targets"] = hosts
        jobs["pdtrim-watch"]["targets"] = [urllib.parse.urlsplit(url).netloc]
        (rules / "own.yaml").write_text(yaml.safe_dump(config))
        with socket_free() as port:
            host = f"127.0.0.1:{port}"
        command = ("prometheus", "--config.file=own.yaml", f"--web.listen-address={host}")
        command += ("--storage.tsdb.path=data", "--log.level=warn")
        with process(*command, cwd=rules):
            until(lambda: reachable(host) and ask(host, 'ALERTS{alertname="PDTrimDrift"}'))
            until(lambda: ask(host, "count_over_time(vllm:kv_cache_usage_perc[1m]) > 2"))
            (drift,) = ask(host, "pdtrim:watch_drift")
            assert drift["value"][1] == "1" and drift["metric"]["plan"] == digest[:12]
            (size,) = ask(host, "max(pdtrim:kv_bytes_per_token)")
            assert size["value"][1] == "3584"
            answered = {e: ask(host, expanded(e)) for e in PANEL_EXPRESSIONS}
            # what a rule has no rate of yet, and buckets, which the recorded pages leave out
            excused = re.compile(r":share5m|:rate5m|:sent5m|:hour\{|_bucket\{")
            silent = [e for e, found in answered.items() if not found]
            assert not [e for e in silent if not excused.search(e)]
            down = [one["metric"] for one in ask(host, "up == 0")]
            assert not down
            with urllib.request.urlopen(f"http://{host}/api/v1/rules", timeout=30) as answer:
                groups = json.load(answer)["data"]["groups"]
            assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}


def reachable(host):
    with contextlib.suppress(OSError):
        ask(host, "1")
        return True
    return False


@contextlib.contextmanager
def socket_free():
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        yield one.getsockname()[1]
