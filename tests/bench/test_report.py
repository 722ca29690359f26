"""The table, the picture, the page, the committed form and the catalogue."""

from __future__ import annotations

import gzip
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from thrifty import InvalidInput, Spend, Work, registry
from thrifty.bench import compact, report
from thrifty.bench.catalogue import NOT_MEASURED, catalogue, effect, main, read_laws
from thrifty.bench.frontier import Frontier, analyse
from thrifty.bench.page import page
from thrifty.bench.store import Contents, Result, read
from thrifty.bench.study import study_from
from thrifty.bench.task import Task

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 ]]> <!--"
PLANS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "short": ("chain-of-draft",),
    "vote": ("self-consistency",),
    "both": ("chain-of-draft", "self-consistency"),
}


def made(n: int = 12, suite: str = "sums", text: str | None = EVIL, evil_names: bool = False) -> Contents:
    results = []
    for i in range(n):
        for k, (plan, methods) in enumerate(PLANS.items()):
            spend = Spend(input=100 + 30 * k + i, output=20 + 40 * (k > 1), calls=1)
            receipts = tuple(
                {"method": m, "fired": (i + k) % 3 > 0, "reason": EVIL, "detail": {"said": EVIL}} for m in methods
            )
            results.append(
                Result(
                    key=f"{suite}/{plan}/{i}",
                    suite=suite,
                    plan=EVIL if evil_names and plan == "short" else plan,
                    plan_hash=f"hash-{plan}",
                    methods=methods,
                    engine="e",
                    task=f"task {i}",
                    task_hash=f"t{i}",
                    score=float((i * (k + 1)) % 4 > 0),
                    spend=spend,
                    work=Work(prefill=spend.input, engine_seconds=0.5),
                    incurred=spend,
                    roles={"answer": spend},
                    receipts=receipts,
                    text=text,
                    error=f"BudgetExceeded: {EVIL}" if i == 0 and k == 1 else None,
                )
            )
    head = {
        "suite": suite,
        "engine": "e",
        "at": "2026-01-01T00:00:00Z",
        "engines": {"answer": {"model": "toy", "dtype": "bfloat16", "note": EVIL}},
        "command": f"thrifty frontier {EVIL}",
        "seeds": [0],
        "plans": [
            {"hash": f"hash-{p}", "name": p, "methods": [{"use": m} for m in methods]} for p, methods in PLANS.items()
        ],
    }
    return Contents(tuple(results), (head,))


def frontier(**options: Any) -> Frontier:
    return analyse(made(**options), "tokens")[0]


class Reader(HTMLParser):
    """Checks that elements close in order and collects what a page holds."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


def parsed(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_asks_for_nothing() -> None:
    tasks = {f"t{i}": Task(id=f"task {i}", messages=({"role": "user", "content": EVIL},), gold=EVIL) for i in range(12)}
    found = parsed(page([frontier(evil_names=True)], tasks=tasks))
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert not {"src", "href", "action", "srcset"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    metas = [attributes for tag, attributes in found.tags if tag == "meta"]
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "http" not in policy and "connect-src" not in policy
    assert [t for t, _ in found.tags].count("script") == 3, "plotly, the data, ours: nothing that a model wrote"


def test_what_models_wrote_is_shown_as_text_and_data_parses() -> None:
    text = page([frontier(evil_names=True)])
    found = parsed(text)
    assert EVIL in "".join(found.text["pre"])
    assert EVIL in "".join(found.text["th"])
    data = text.split('<script type="application/json" id="plots">')[1].split("</script>")[0]
    assert "<" not in data
    (plot,) = json.loads(data)
    assert [p["name"] for p in plot["points"]] == ["plain", EVIL, "vote", "both"]
    assert "<script>" not in plot["points"][1]["hover"]


def test_the_page_tells_what_was_run_and_what_fired() -> None:
    found = parsed(page([frontier(), frontier(suite="other")]))
    shown = " ".join("".join(v) for v in found.text.values())
    for part in (
        "toy bfloat16",
        "thrifty frontier",
        "sums",
        "other",
        "could have shown",
        "8 of 12",
        "chain-of-draft",
    ):
        assert part in shown, part
    assert sum(tag == "div" and (a.get("id") or "").startswith("plot") for tag, a in found.tags) == 2


# -- the picture and the table -------------------------------------------------------------------------------


def test_the_picture_has_ink_in_every_panel(tmp_path: Path) -> None:
    import matplotlib.image
    import numpy as np

    picture, html = report.write([frontier(), frontier(suite="other"), frontier(suite="third")], tmp_path / "out")
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    pixels = matplotlib.image.imread(picture)
    height, width = pixels.shape[:2]
    assert width > 1500 and height > 1000
    for row, column, filled in ((0, 0, True), (0, 1, True), (1, 0, True), (1, 1, False)):
        top, left = row * height // 2, column * width // 2
        part = pixels[top + 20 : top + height // 2 - 20, left + 20 : left + width // 2 - 20]
        assert bool((np.ptp(part[..., :3], axis=(0, 1)) > 0.5).all()) is filled


def test_labels_cover_no_point_and_no_other_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    from thrifty.bench.plot import draw

    boxes: list[Any] = []

    def measure(figure: Any) -> None:
        renderer = figure.canvas.get_renderer()
        texts = [t for t in figure.axes[0].texts if t.get_text()]
        boxes.extend(t.get_window_extent(renderer) for t in texts)

    monkeypatch.setattr(plt, "close", measure)
    draw([frontier()], tmp_path / "f.png")
    assert len(boxes) == len(PLANS)
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1)


@pytest.mark.parametrize("width", [80, 100, 170])
def test_the_table_fits_and_ends_with_what_n_could_not_show(width: int) -> None:
    out = io.StringIO()
    report.show(frontier(text=None), Console(file=out, width=width, force_terminal=True, color_system=None))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(out.getvalue().split())
    assert "\u2026" not in text, "nothing is cut off"
    for part in ("plain *", "score", "saving", "reference", "chain-of-draft", "67%"):
        assert part in text, part
    assert re.search(r"n = 12: the smallest difference of scores .* \(80% power, two-sided 5%\)\.$", text)


def test_markup_in_a_plans_name_is_not_read(tmp_path: Path) -> None:
    contents = made(3)
    odd = tuple(r if r.plan != "short" else Result(**{**_fields(r), "plan": "[red]x[/red]"}) for r in contents.results)
    out = io.StringIO()
    report.show(analyse(Contents(odd, contents.heads), "tokens")[0], Console(file=out, width=170))
    assert "[red]x[/red]" in out.getvalue()


def _fields(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in Result.__dataclass_fields__}


def test_no_frontier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no frontier"):
        report.write([], tmp_path)


# -- the committed form --------------------------------------------------------------------------------------


def test_the_committed_form_reads_back_and_quotes_no_model(tmp_path: Path) -> None:
    (path,) = compact.write(made(), tmp_path)
    assert path == tmp_path / "sums" / "toy-bfloat16.jsonl.gz"
    raw = gzip.decompress(path.read_bytes()).decode()
    for row in map(json.loads, raw.rstrip("\n").split("\n")):
        if "run" not in row:
            assert "text" not in row and "alert" not in json.dumps(row)
    before, after = (analyse(c, "tokens")[0].to_dict() for c in (made(), read(path)))
    assert after == before, "score, spend and fired shares are all there"
    assert compact.write(made(), tmp_path / "again")[0].read_bytes() == path.read_bytes()
    assert study_from(path).frontiers[0].reference.plan == "plain"


def test_a_failed_result_is_not_committed(tmp_path: Path) -> None:
    contents = made(2)
    failed = Result(**{**_fields(contents.results[0]), "score": None})
    (path,) = compact.write(Contents((failed, *contents.results[1:]), contents.heads), tmp_path)
    assert len(read(path).results) == 7
    with pytest.raises(InvalidInput, match="no finished result"):
        compact.write(Contents((failed,), ()), tmp_path)


def test_a_file_over_the_limit_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "MOST_BYTES", 100)
    with pytest.raises(InvalidInput, match="use fewer examples"):
        compact.write(made(), tmp_path / "results")
    assert not (tmp_path / "results").exists()


# -- the catalogue -------------------------------------------------------------------------------------------


def test_the_catalogue_has_every_method_and_what_was_measured(tmp_path: Path) -> None:
    compact.write(made(40), tmp_path / "results")
    text = catalogue(tmp_path / "results")
    assert text == catalogue(tmp_path / "results")
    for name in registry.names():
        section = text.split(f"\n### {name}\n")[1].split("\n### ")[0]
        method = registry.get(name)
        assert all(f"`{knob}`" in section for knob in method.knobs())
        if name in ("chain-of-draft", "self-consistency"):
            assert "on sums, toy bfloat16, n = 40: score" in section and "stacked: chain-of-draft > self-" in section
            assert NOT_MEASURED not in section
        else:
            assert NOT_MEASURED in section
    assert effect("no-thinking", tmp_path / "results") == [NOT_MEASURED]
    assert len(effect("chain-of-draft", tmp_path / "results")) == 2


def test_the_catalogue_has_stacks_beside_their_parts_and_the_instruments(tmp_path: Path) -> None:
    compact.write(made(40), tmp_path / "results")
    text = catalogue(tmp_path / "results")
    (stacks,) = re.findall(r"\n## Stacks\n(.*?)\n## ", text, re.DOTALL)
    (row,) = [line for line in stacks.split("\n") if line.startswith("| short | vote |")]
    # by hand: (i * (k + 1)) % 4 is above 0 in 3 of 4 for k = 0 and 2, in 1 of 2 for k = 1, never for k = 3
    assert "| 0.50, 0.75, 0.00 |" in row
    assert "`plain` alone: score 0.75" in stacks and "n = 40" in stacks
    instruments = text.split("\n## Analyses, evaluations and bounds\n")[1]
    for name, declared in registry.instruments().items():
        assert f"| {name} | {declared.instrument.kind} | `{declared.instrument.runs}` |" in instruments


def test_skipped_laws_are_printed_with_their_reasons(tmp_path: Path) -> None:
    laws = tmp_path / "laws.json"
    laws.write_text(json.dumps({"truncation": {"seed": "passed", "padding": "skipped: no <tensors> | here"}}))
    target = tmp_path / "catalogue.md"
    assert main([str(tmp_path), str(target), "--laws", str(laws)]) == 0
    section = target.read_text().split("\n### truncation\n")[1].split("\n### ")[0]
    assert "Laws: 1 run, skipped:" in section
    assert "- padding: no &lt;tensors> \\| here" in section


def test_broken_inputs_of_the_catalogue_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laws = tmp_path / "laws.json"
    laws.write_text('{"truncation": 3}')
    with pytest.raises(InvalidInput, match="laws .*an object such as"):
        read_laws(laws)
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "toy.jsonl.gz").write_bytes(b"no gzip")
    assert main([str(tmp_path), str(tmp_path / "page.md")]) == 2
    assert "toy.jsonl.gz: cannot be read" in capsys.readouterr().err
