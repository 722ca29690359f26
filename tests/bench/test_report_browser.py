"""The page in a real browser: it draws without a network, runs nothing that a model wrote, and fits a
phone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from thrifty import Spend
from thrifty.bench.frontier import analyse
from thrifty.bench.page import page
from thrifty.bench.store import Contents, Result

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=10000",
)
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"

if BROWSER is None and os.environ.get("CI") != "true":
    pytest.skip("no chromium here: apt-get install chromium", allow_module_level=True)

PROBE = """
<script>
// Writes what the browser made of the page into it, for the test to read.
window.addEventListener("load", function () {
  const edge = document.documentElement.clientWidth + 1;
  const wide = Array.from(document.querySelectorAll("body *")).filter(function (e) {
    return e.getBoundingClientRect().right > edge && !e.closest(".scroll, .plot, svg");
  });
  const found = {
    drawn: document.documentElement.dataset.drawn,
    title: document.title,
    points: document.querySelectorAll(".scatterlayer .point").length,
    arms: document.querySelectorAll(".errorbars .yerror").length,
    names: Array.from(document.querySelectorAll(".textpoint text")).map(function (e) { return e.textContent; }),
    images: document.images.length,
    loaded: performance.getEntriesByType("resource").map(function (e) { return e.name; }),
    ink: getComputedStyle(document.body).color,
    paper: getComputedStyle(document.body).backgroundColor,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    wide: wide.map(function (e) { return e.tagName + "." + e.className; }),
  };
  const out = document.createElement("output");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.appendChild(out);
});
</script>
"""


def results() -> Contents:
    plans = {"plain": (), EVIL: ("truncation",), "a-plan-with-quite-a-long-name": ("fixed-k",)}
    made = []
    for i in range(10):
        for k, (plan, methods) in enumerate(plans.items()):
            spend = Spend(input=1000 - 300 * k + i, output=10, calls=1)
            receipts = tuple({"method": m, "fired": i > 3, "reason": EVIL} for m in methods)
            made.append(
                Result(
                    f"{k}/{i}",
                    "needles",
                    plan,
                    f"h{k}",
                    methods,
                    "e",
                    f"t{i}",
                    f"th{i}",
                    float((i + k) % 3 > 0),
                    spend=spend,
                    roles={"answer": spend},
                    receipts=receipts,
                    text=EVIL,
                )  # fmt: skip
            )
    return Contents(tuple(made), ({"suite": "needles", "engine": "e", "plans": [], "command": EVIL},))


def opened(tmp_path: Path, width: int, *flags: str) -> dict[str, object]:
    assert BROWSER is not None, "CI must have chromium: apt-get install chromium"
    file = tmp_path / "report.html"
    text = page([analyse(results(), "tokens")[0]])
    file.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER, *FLAGS, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
            "--dump-dom", file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )  # fmt: skip
    answer = re.search(r'<output id="found">(.*?)</output>', done.stdout, re.DOTALL)
    assert answer is not None, done.stderr[-2000:]
    found: dict[str, object] = json.loads(html.unescape(answer[1]))
    return found


def test_it_draws_and_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    found = opened(tmp_path, 1200)
    assert found["drawn"] == "1"
    assert found["points"] == 3 and found["arms"] == 3
    assert sorted(found["names"]) == sorted(["plain", EVIL, "a-plan-with-quite-a-long-name"])  # type: ignore[arg-type]
    assert found["title"] == "Thrifty: needles" and found["images"] == 0
    assert found["loaded"] == []
    assert found["paper"] == "rgb(255, 255, 255)"


def test_it_fits_a_phone_and_turns_dark(tmp_path: Path) -> None:
    found = opened(tmp_path, 500, "--blink-settings=preferredColorScheme=0")
    assert found["drawn"] == "1" and found["points"] == 3
    assert found["overflow"] == 0 and found["wide"] == []
    assert found["paper"] == "rgb(15, 19, 24)" and found["ink"] == "rgb(230, 237, 243)"
