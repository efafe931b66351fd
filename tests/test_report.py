"""The page: it holds what the runs hold, runs nothing of theirs, and computes as Python does."""

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cost_files import service, write
from page_runs import HOSTILE, hostile_runs, result_data, roi_data, row
from pdtrim.cli import app
from pdtrim.cost.fleet import Fleet
from pdtrim.cost.worth import Side, break_even_hours, saving_a_year
from pdtrim.errors import PdtrimError
from pdtrim.report.page import render as rendering
from pdtrim.report.page import runs as reading
from pdtrim.report.page.charts import best_rows, scatter
from pdtrim.report.page.record import Sent
from pdtrim.verbs.report import ReportConfig, write_report

ROOT = Path(__file__).parent.parent
PAGE = Path(rendering.__file__).parent
NODE, CHROMIUM = shutil.which("node"), shutil.which("chromium")


class Seen(HTMLParser):
    """Elements, their attributes, and the text of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.raw, self.words = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append("")

    def handle_data(self, data):
        if self.cdata_elem:
            self.raw[-1] += data
        else:
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    out = write_report(hostile_runs(folder / "runs"), folder / "report.html")
    return out.read_text(encoding="utf-8")


def test_make_report_shows_the_committed_benchmarks_and_loads_nothing(tmp_path):
    line = re.search(r"^REPORT := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), flags=re.M)
    paths = line[1].replace("\\\n", " ").split()
    html = write_report([ROOT / path for path in paths], tmp_path / "r.html").read_text()
    seen = Seen(html)
    assert len(paths) >= 8 and not [a for _, a in seen.elements if "src" in a]
    assert all(a.get("href", "#").startswith("#") for _, a in seen.elements)
    for path in paths:
        assert str(ROOT / path) in "".join(seen.words)
    for text in ("codec@int8", "flap+pdtrim", "cmmlu", "entropy:k_step=0.6", "12 16 17"):
        assert text in html


def test_a_runs_text_stays_text(hostile):
    seen = Seen(hostile)
    assert len(seen.all("script")) == 2 and not seen.all("img")
    assert "".join(seen.words).count(HOSTILE) >= 4
    data = json.loads(seen.raw[1])
    assert data[2]["sent"][1]["name"] == HOSTILE
    assert not set("<>&\u2028\u2029") & set(seen.raw[1])


def test_embedded_data_keep_every_letter():
    text = '</script><!-- & \u2028 \u2029 \\ " é'
    assert json.loads(rendering.embedded({"a": text})) == {"a": text}
    assert not set("<>&\u2028\u2029") & set(rendering.embedded(text))


def test_the_policy_allows_the_own_script_and_style_and_nothing_else(hostile):
    seen = Seen(hostile)
    policy = next(a["content"] for a in seen.all("meta") if "http-equiv" in a)
    style, _, script = seen.raw
    for text in (style, script):
        assert f"'{rendering._hash(text)}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not [a for _, a in seen.elements if "style" in a or any(k.startswith("on") for k in a)]


def test_controls_have_labels_and_what_scrolls_takes_the_keyboard(hostile):
    seen = Seen(hostile)
    labelled = {a["for"] for a in seen.all("label")}
    assert {a["id"] for tag in ("input", "select") for a in seen.all(tag)} == labelled
    assert all(a.get("tabindex") == "0" for a in seen.all("div") if a.get("class") == "scroll")


def test_the_sections_say_what_the_runs_say(hostile):
    text = re.sub(r"\s+", " ", "".join(Seen(hostile).words))
    for words in (
        "block 2, prefill attention: kv", "block 2, prefill MLP: off", "block 2, decode MLP: runs",
        "block 0, decode: 1.2500", "block 1, prefill: 0.0000", "Paris is the capital of France.",
        "pdtrim roi", "0" * 64, "Cache of layers 0-3",
    ):  # fmt: skip
        assert words in text, words


def test_a_simulated_point_has_the_gpus_that_roi_saved(tmp_path):
    data = roi_data(tmp_path)
    run = reading.read_run(str(write(tmp_path / "roi.json", json.dumps(data))))
    made = run.savings
    assert made.dense_gpus - made.pruned_gpus == data["saving"]["gpus"] != 0
    assert made.gpu_watts == pytest.approx(700.0) and made.search_s == pytest.approx(3600.0)
    ends = [
        r[end] for r in data["sensitivity"] if r["input"] != "gpu_hour" for end in ("low", "high")
    ]
    assert len(ends) == len(made.cases) == 12
    for case, money in zip(made.cases, ends, strict=True):
        assert (case.gpus is None) == (money is None)
        assert money is None or case.gpus * 2.5 * 8760 == pytest.approx(money)
    assert any(case.gpus for case in made.cases)


def test_the_page_says_the_command_that_makes_its_roi(tmp_path):
    data = roi_data(tmp_path)
    words = reading.read_run(str(write(tmp_path / "roi.json", json.dumps(data)))).source.command
    for option in (
        "--isl 1000", "--link-gbit-s 1", "--gpu-watts 700", "--kv-bytes-per-token 100",
        f"--stages {tmp_path / 'times.json'}", f"--codecs {tmp_path / 'codec.json'}",
    ):  # fmt: skip
        assert option in words, option
    assert "--quantile" not in words and words.endswith("--json > ROI")


def test_a_way_is_best_if_none_is_better_in_both():
    points = ((8, 0.0), (2, 0.02), (3, 0.03), (3, 0.01), (3, 0.01))
    sent = [Sent(name="", sent_bytes=b, kl=kl) for b, kl in points]
    assert best_rows(sent) == {0, 1, 3}
    marks = {mark.number: mark for mark in scatter(sent).marks}
    assert marks[1].x > marks[3].x > marks[2].x and marks[1].y > marks[2].y > marks[3].y


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '{"schema": "pdtrim.other/1"}', '{"schema": [1]}', '{"schema": "pdtrim.result/1"}',
     '{"cells": 3}', "no json"],
)  # fmt: skip
def test_a_run_that_is_not_understood_is_named(tmp_path, text):
    path = write(tmp_path / "odd.json", text)
    with pytest.raises(PdtrimError, match=re.escape(str(path))) as caught:
        write_report([path], tmp_path / "r.html")
    assert "\n" not in str(caught.value) and not (tmp_path / "r.html").exists()


def test_what_is_accepted_is_said(tmp_path):
    for path in (tmp_path, write(tmp_path / "odd.json", "{}")):
        with pytest.raises(PdtrimError, match=r"give a plan, .* roi --json"):
            reading.read_run(str(path))


@pytest.mark.parametrize(
    "table", ["| a |\n|---|\n", "| block | x |\n|---|---|\n| 0 | nan |\n", "x"]
)
def test_a_damaged_table_of_sensitivity_is_named(tmp_path, table):
    with pytest.raises(PdtrimError, match=r"t\.md is no table"):
        reading.read_run(str(write(tmp_path / "t.md", table)))


def test_sizes_are_bounded(tmp_path, monkeypatch):
    data = result_data()
    data["rows"] = [row(str(i)) for i in range(1001)]
    path = str(write(tmp_path / "many.json", json.dumps(data)))
    with pytest.raises(PdtrimError, match="1,001 rows"):
        reading.read_run(path)
    with pytest.raises(PdtrimError, match="1 to 64 runs"):
        reading.read_runs([path] * 65)
    monkeypatch.setattr(reading, "MAX_BYTES", 1000)
    with pytest.raises(PdtrimError, match="more than 1,000 bytes"):
        reading.read_run(path)


def test_the_command_writes_the_page(tmp_path, capsys):
    path = str(write(tmp_path / "result.json", json.dumps(result_data())))
    out = tmp_path / "r.html"
    app(["report", path, "-o", str(out), "--title", "A & B"], standalone_mode=False)
    assert "<title>A &amp; B</title>" in out.read_text() and str(out) in capsys.readouterr().out
    assert ReportConfig().title in write_report([path], out).read_text()


def fleet(gpus):
    names = [name for name in Fleet.__dataclass_fields__ if not name.endswith("_gpus")]
    return Side(fleet=Fleet(prefill_gpus=gpus, decode_gpus=0, **dict.fromkeys(names, 1.0)))


def python_formulas(case):
    dense, pruned, price, work, watts, search = case[:6]
    sides = [Side(fleet=None) if n is None else fleet(n) for n in (dense, pruned)]
    saving = saving_a_year(*sides, price)
    kwh = None if dense is None else sides[0].to_json(price, watts)["kwh_a_year"]
    return [
        sides[0].money_a_year(price), saving, break_even_hours(work, saving), kwh,
        search / 3600 * price,
    ]  # fmt: skip


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_pages_formulas_are_pythons(tmp_path):
    rng = random.Random(0)
    counts = [None, 1, 2, 17, 20_000]
    cases = [
        [
            rng.choice(counts), rng.choice([*counts, rng.randint(1, 500)]),
            10 ** rng.uniform(-3, 3), rng.choice([0.0, 10 ** rng.uniform(-2, 7)]),
            10 ** rng.uniform(0, 4), 10 ** rng.uniform(-1, 6),
        ]
        for _ in range(2000)
    ]  # fmt: skip
    links = [10 ** rng.uniform(-2, 4) for _ in range(300)]
    tokens = [rng.randint(1, 4000) for _ in links]
    moved = [
        service(tmp_path, gbit_s=link).handover(n) for link, n in zip(links, tokens, strict=True)
    ]
    sends = [
        [one.sent_bytes, link, one.encode_s, one.decode_s]
        for one, link in zip(moved, links, strict=True)
    ]
    script = (PAGE / "formulas.js").read_text() + (
        f"const cases = {json.dumps(cases)}, sends = {json.dumps(sends)};"
        "console.log(JSON.stringify([cases.map(([d, p, price, work, watts, search]) => {"
        " const s = savingAYear(d, p, price); return [moneyAYear(d, price), s,"
        " breakEvenHours(work, s), kwhAYear(d, watts), workCost(search, price)]; }),"
        " sends.map((s) => handoverSeconds(...s))]));"
    )
    done = subprocess.run([NODE, "-"], input=script, capture_output=True, text=True, check=True)
    money, seconds = json.loads(done.stdout)
    assert money == [python_formulas(case) for case in cases]
    assert seconds == [one.seconds for one in moved]


def browse(html, folder):
    """The document as a real browser has it after the scripts ran."""
    page = write(folder / "page.html", html)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
        f"--user-data-dir={folder}/profile", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def shown(html, name):
    return re.search(f'data-is="{name}"[^>]*>([^<]*)', html)[1]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_runs_nothing_of_a_runs_text(hostile, tmp_path):
    through = (
        "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    )
    html = browse(hostile.replace("<main", f"{through}<main"), tmp_path)
    assert re.search("<title>([^<]*)", html)[1] == ReportConfig().title
    assert re.findall('class="ms">([^<]*)', html) == ["0.640", "0.160", "0.240"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_recomputes_what_the_controls_change(hostile, tmp_path):
    acts = """<script>
    function set(id, value) {
      const input = document.getElementById(id);
      input.value = value;
      input.dispatchEvent(new Event("input"));
    }
    set("link", "1"); set("price1", "5"); set("watts1", "1000");
    </script>"""
    free = re.sub("<meta http-equiv[^>]*>", "", hostile).replace("</body>", f"{acts}</body>")
    html = browse(free, tmp_path)
    assert re.findall('class="ms">([^<]*)', html) == ["6.400", "1.600", "2.400"]
    saved, dense = (int(shown(html, f"{side}-gpus")) for side in ("saved", "dense"))
    assert shown(html, "saved-money") == f"{saved * 5 * 8760:,}"
    assert shown(html, "dense-kwh") == f"{dense * 8760:,}"
    assert shown(html, "paid") == f"The work is paid after {5 / (5 * saved):.1f} hours of serving."
    html = browse(free.replace('set("watts1", "1000")', 'set("case1", "0")'), tmp_path)
    case = json.loads(Seen(hostile).raw[1])[1]["savings"]["cases"][0]
    assert shown(html, "saved-gpus") == f"{case['gpus']}" and shown(html, "dense-gpus") == "-"
