"""What ``roi`` and ``assess`` say, and that they need no torch to say it."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cost_files import codec_data, pair_metrics, plan_data, prometheus, times_data, write
from pdtrim.cli import app
from pdtrim.cost import worth
from pdtrim.cost.metrics import parse, read_servers
from pdtrim.errors import PdtrimError
from pdtrim.verbs.assess import AssessConfig, assess
from pdtrim.verbs.roi import RoiConfig, estimate_roi

HOURS = 8760


@pytest.fixture
def files(tmp_path):
    """A plan, stage times and codec speeds of one machine."""
    return {
        "plan": str(write(tmp_path / "plan.json", plan_data())),
        "stages": str(write(tmp_path / "times.json", times_data())),
        "codecs": (str(write(tmp_path / "codecs.json", codec_data())),),
    }


def roi_config(files, **changes):
    given = {
        "system": "bench_sxm", "isl": 1000, "osl": 100, "rate": 40.0, "ttft": 0.3, "tpot": 0.01,
        "link_gbit_s": 1.0, "gpu_hour": 2.0, "stages": files["stages"], "codecs": files["codecs"],
    }  # fmt: skip
    return RoiConfig(**{**given, **changes})


def test_roi_is_the_difference_of_two_fleets(files):
    found = estimate_roi(files["plan"], roi_config(files, work_cost=500.0, gpu_watts=700.0))
    dense, pruned, saving = found["dense"], found["pruned"], found["saving"]
    assert pruned["prefill_gpus"] < dense["prefill_gpus"]
    assert pruned["handover_bytes"] == dense["handover_bytes"] / 4
    for one in (dense, pruned):
        assert one["gpus"] == one["prefill_gpus"] + one["decode_gpus"]
        assert one["money_a_year"] == one["gpus"] * 2.0 * HOURS
        assert one["kwh_a_year"] == pytest.approx(one["gpus"] * HOURS * 0.7)
    assert saving["money_a_year"] == dense["money_a_year"] - pruned["money_a_year"] > 0
    assert saving["break_even_hours"] == 500 / (saving["gpus"] * 2.0)
    moved = {row["input"]: row for row in found["sensitivity"]}
    assert moved["gpu_hour"]["high"] == pytest.approx(1.25 * saving["money_a_year"])
    assert moved["rate"]["high"] >= saving["money_a_year"] >= moved["rate"]["low"]
    assert set(moved) == set(found["inputs"])
    assert files["stages"] in found["sources"]["stage times"]
    assert files["codecs"][0] in found["sources"]["codecs"]
    json.dumps(found, allow_nan=False)


def test_the_search_is_the_work_if_no_price_is_given(files):
    saving = estimate_roi(files["plan"], roi_config(files))["saving"]
    assert saving["work_cost"] == 2.0  # an hour


def test_a_dense_fleet_that_misses_its_target_has_no_money(files):
    found = estimate_roi(files["plan"], roi_config(files, ttft=0.104, rate=1.0, link_gbit_s=1.0))
    assert not found["dense"]["reached"] and "without any queue" in found["dense"]["reason"]
    assert found["pruned"]["reached"] and found["saving"]["money_a_year"] is None


def test_what_never_pays_has_no_break_even():
    assert worth.break_even_hours(10.0, 0.0) is None
    assert worth.break_even_hours(10.0, -5.0) is None
    assert worth.break_even_hours(10.0, 8760.0) == 10.0


MISSING = {
    "ttft": ({"ttft": None}, "give --ttft"),
    "link": ({"link_gbit_s": None}, "give --link-gbit-s"),
    "price": ({"gpu_hour": None}, "give --gpu-hour"),
    "rate": ({"rate": None}, "give --rate"),
    "lengths": ({"isl": None}, "--isl and --osl, or --trace"),
    "negative": ({"rate": -1.0}, "--rate -1"),
    "not a number": ({"overlap": float("nan")}, "--overlap nan"),
    "system": ({"stages": None}, "give --stages"),
    "other system": ({"system": "h100_sxm"}, "not on --system h100_sxm"),
    "codec": ({"codecs": ()}, "codec 'int4' is not measured"),
    "too long": ({"isl": 90_000}, "beyond what is measured"),
    "no file": ({"stages": "nowhere.json"}, "no file at nowhere.json"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_not_known_is_asked_for_in_one_line(files, what):
    changes, words = MISSING[what]
    with pytest.raises(PdtrimError, match=words) as caught:
        estimate_roi(files["plan"], roi_config(files, **changes))
    assert "\n" not in str(caught.value)


def test_the_command_prints_sources_and_needs_no_torch(files):
    code = (
        "import sys; from pdtrim.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('END', end.code, 'torch' in sys.modules)\n"
    )
    config = roi_config(files)
    options = ["--stages", config.stages, "--codecs", config.codecs[0], "--system", config.system]
    for name in ("isl", "osl", "rate", "ttft", "tpot", "link-gbit-s", "gpu-hour"):
        options += [f"--{name}", str(getattr(config, name.replace("-", "_")))]
    command = [sys.executable, "-c", code, "roi", files["plan"], *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "END 0 False", done.stderr
    assert "money a year" in done.stdout and "a test's machine" in done.stdout


def test_metrics_are_parted_into_queue_prefill_handover_and_decode(tmp_path):
    seen = read_servers(pair_metrics(tmp_path))
    assert seen.queue_s == pytest.approx(0.1 + 0.25 - 0.2)
    assert (seen.prefill_s, seen.handover_s) == pytest.approx((0.4, 0.2))
    assert (seen.decode_s, seen.prompt, seen.answer) == pytest.approx((1.0, 4000, 100))
    assert seen.model == "org/model"
    own = read_servers(pair_metrics(tmp_path, **{"pdtrim__handover_seconds": 0.24}))
    assert own.handover_s == pytest.approx(0.24)


def config_of(files, **changes):
    return AssessConfig(system="bench_sxm", codecs=files["codecs"], **changes)


def test_a_slow_link_asks_for_a_codec_and_a_fast_one_does_not(files, tmp_path):
    places = pair_metrics(tmp_path)
    found = assess(config_of(files, ttft=0.5), metrics=places)
    assert found["link_gbit_s"] == pytest.approx(10.0)  # 250 MB in 0.2 s
    codec = found["levers"][1]
    assert codec["saves_s"] == pytest.approx(0.2 * 3 / 4 - 0.25 / 10 - 0.25 / 20)
    assert found["advice"][1] == (
        "pdtrim plan org/model -o plan.json --prefill-remove 0.25 --kv-compression 4"
        " --link-gbit-s 10"
    )
    fast = assess(config_of(files, link_gbit_s=400.0), metrics=places)
    assert len(fast["levers"]) == 1 and "--kv-compression" not in " ".join(fast["advice"])


def test_a_short_prompt_on_a_fast_link_is_not_to_be_pruned(files, tmp_path):
    lines = '{"prompt_tokens": 20, "output_tokens": 400}\n' * 3
    trace = str(write(tmp_path / "short.jsonl", lines))
    ask = config_of(files, stages=files["stages"], tpot=0.01, link_gbit_s=400.0)
    assert assess(ask, trace=trace)["advice"] == [
        "do not prune: neither fewer blocks nor a codec saves enough here"
    ]
    lines = '{"prompt_tokens": 4000, "output_tokens": 10}\n' * 3
    trace = str(write(tmp_path / "long.jsonl", lines))
    found = assess(replace(ask, rate=5.0, ttft=1.0), trace=trace)
    assert found["advice"][1].startswith("pdtrim plan MODEL -o plan.json --prefill-remove 0.25")
    assert found["parts"][0]["seconds"] > 0 and found["parts"][1]["seconds"] == pytest.approx(0.4)
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)


RECORDED = [str(Path(__file__).parent / "recorded" / f"{x}.prom") for x in ("prefill", "decode")]


def test_recorded_pages_of_a_served_pair_are_read():
    """18 requests, and one that decode refused: vLLM says it was scheduled hours before it came."""
    pages = [parse(Path(place).read_text(encoding="utf-8"), place) for place in RECORDED]
    assert pages[1].mean("vllm:request_queue_time_seconds") < -100
    seen = read_servers(RECORDED)
    assert (seen.prompt, seen.model) == (1875 / 18, "m")
    assert seen.answer == pytest.approx(288 / 19)
    assert seen.sent_bytes == 7225344 / 18
    assert seen.handover_s == pytest.approx(0.19131 / 18, rel=1e-3)
    parts = (seen.queue_s, seen.prefill_s, seen.handover_s, seen.decode_s)
    assert min(parts) > 0
    # what both servers measured from a request's arrival to its end, HTTP and tokens beside
    first, second = (page.mean("vllm:e2e_request_latency_seconds") for page in pages)
    assert 0.9 * (first + second) < sum(parts) < first + second


def test_recorded_pages_are_assessed(files):
    found = assess(config_of(files), metrics=RECORDED)
    shares = {part["part"]: part["share"] for part in found["parts"]}
    assert shares["decode"] > 0.5 > shares["prefill"] > shares["handover"] > 0
    assert found["link_gbit_s"] == pytest.approx(7225344 / 18 * 8 / found_handover(found) / 1e9)


def found_handover(found):
    return next(p["seconds"] for p in found["parts"] if p["part"] == "handover")


def test_a_prefill_server_that_refused_keeps_its_sum(tmp_path):
    """Its queue's time is below 0, and what is missing there is prefill's."""
    places = pair_metrics(tmp_path)
    refused = prometheus(
        vllm__request_queue_time_seconds=-999.9, vllm__request_prefill_time_seconds=1000.4,
        vllm__request_decode_time_seconds=0.0, vllm__request_prompt_tokens=4000,
        vllm__request_generation_tokens=1,
    )  # fmt: skip
    Path(places[0]).write_text(refused)
    seen = read_servers(places)
    assert seen.prefill_s == pytest.approx(0.5) and seen.queue_s == pytest.approx(0.05)


SPOILED = {
    "not metrics": ("what { is this", "no Prometheus text"),
    "nothing of vLLM": ("up 1\n", "no metrics of vLLM"),
    "no decode server": (prometheus(vllm__request_generation_tokens=1), "no decode server"),
    "binary": ("\udcff", "no Prometheus text"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_metrics_are_one_line(tmp_path, what):
    text, words = SPOILED[what]
    path = tmp_path / "m.prom"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PdtrimError, match=words) as caught:
        read_servers([str(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1/metrics", "https://127.0.0.1/", "file:///etc/passwd"]
)
def test_only_loopback_is_asked(url):
    with pytest.raises(PdtrimError, match="not http on loopback"):
        read_servers([url])


def test_a_server_on_loopback_is_read_and_sends_nobody_elsewhere(tmp_path):
    first, second = (Path(path).read_bytes() for path in pair_metrics(tmp_path))

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            page = {"/p": first, "/d": second}.get(self.path)
            self.send_response(200 if page else 302)
            if not page:
                self.send_header("Location", "/p")
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert read_servers([f"{base}/p", f"{base}/d"]).prefill_s == pytest.approx(0.4)
        with pytest.raises(PdtrimError, match="cannot read"):
            read_servers([f"{base}/elsewhere"])
        server.shutdown()


def test_assess_prints_the_verdict(files, tmp_path):
    places = pair_metrics(tmp_path)
    args = ["assess", "--system", "bench_sxm", "--codecs", files["codecs"][0], "--ttft", "0.5"]
    done = CliRunner().invoke(app, [*args, "--metrics", places[0], "--metrics", places[1]])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1].startswith("pdtrim plan org/model")
    assert "d.prom" in done.output
    both = CliRunner().invoke(app, [*args, "--json"])
    assert isinstance(both.exception, PdtrimError) and "either --metrics" in str(both.exception)


def test_the_commands_of_the_docs_have_options_that_exist():
    text = (Path(__file__).parent.parent / "docs" / "operate.md").read_text(encoding="utf-8")
    text = text.replace("\\\n", " ")
    commands = typer.main.get_command(app).commands
    lines = [line.split() for line in text.splitlines() if line.startswith("pdtrim ")]
    assert {words[1] for words in lines} == {
        "assess", "plan", "eval", "roi", "export", "serve", "watch",
    }  # fmt: skip
    for words in lines:
        known = {name for option in commands[words[1]].params for name in option.opts}
        assert {word for word in words if word.startswith("-")} <= known, words
