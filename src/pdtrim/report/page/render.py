"""Runs as one HTML file: nothing is loaded, and nothing runs but the script that comes with pdtrim.

What a run holds is text: the template escapes it, the script reads it from a block of data and sets
it as text. A Content-Security-Policy in the page allows this script and this style by their hashes,
so that a name that got through would still not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from pdtrim.report.page import charts
from pdtrim.report.page.record import Run

MOST_SENT = 12
"""Ways to send that are shown at once; the best of more, and all of them below."""
ESCAPED = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


def render(runs: Sequence[Run], *, title: str, made: str) -> str:
    """The page.

    Args:
        made: by what, and when.
    """
    style = _part("page.css")
    script = _part("formulas.js") + _part("page.js")
    environment = Environment(
        loader=DictLoader({name: _part(name) for name in ("page.html.j2", "charts.html.j2")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}';"
        " base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        made=made,
        runs=runs,
        charts=charts,
        most_sent=MOST_SENT,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        data=Markup(embedded(_data(runs))),
    )


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: no text in it can end the element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    for letter, escape in ESCAPED.items():
        text = text.replace(letter, escape)
    return text


def _data(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the script computes with; its keys are those of the records."""
    return [
        {
            "sent": [asdict(row) for row in run.sent],
            "savings": None if run.savings is None else asdict(run.savings),
        }
        for run in runs
    ]


def _part(name: str) -> str:
    return files("pdtrim.report.page").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an element's text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
