"""The HTML report: self-contained, true to its inputs, safe against what a model may say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from megatron_mm.config import config_from_dict, dump_yaml
from megatron_mm.evaluation.charts import line_chart
from megatron_mm.evaluation.report import SAMPLES, curves, write_report
from tests.unit.test_config import MINIMAL

SCORES = {
    "n": 200, "n_by_shots": {"0": 200, "4": 50}, "vqa_accuracy": {"0": 0.8125, "4": 0.79},
    "vqa_accuracy_shuffled": 0.665, "vqa_accuracy_question_only": 0.67, "resumed_at_step": 20,
}  # fmt: skip


class Page(HTMLParser):
    """Every tag with its attributes, and whether each that was opened is closed."""

    VOID = frozenset(["meta", "img", "br"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def record(stage: str, number: int, image: Path, **changes: Any) -> dict[str, Any]:
    base = {"stage": stage, "id": str(number), "image": str(image), "question": f"question {number}?", "answer": "red"}
    return base | {"prediction": "red" if number % 2 else "blue", "correct": float(number % 2)} | changes


@pytest.fixture
def report(tmp_path: Path) -> str:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(config_from_dict(MINIMAL)))
    lines: list[dict[str, Any]] = []
    for step in range(5, 45, 5):
        lines.append(
            {"step": step, "loss": 9 / step, "loss/captions": 8 / step, "tokens_per_s": 100.0, "images_per_s": 3}
        )
        if step != 10:  # a step may hold no text sequence
            lines[-1]["loss/text"] = 7 / step
    lines.append({"step": 40, "validation/captions": 0.3, "validation/text": None})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    image = tmp_path / "image.png"
    Image.new("RGB", (4, 4), (200, 0, 0)).save(image)
    records = [record("4-shot", 1000, image), record("0-shot", 0, image, prediction="<script>alert(1)</script>")]
    records += [record("0-shot", n, image) for n in range(1, SAMPLES + 10)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    output = tmp_path / "out" / "report.html"
    write_report(
        output,
        title="a run",
        run_dir=run,
        scores=SCORES,
        records=tmp_path / "records.jsonl",
        facts={"machine": "2 <cores>"},
    )
    assert [p.name for p in output.parent.iterdir()] == ["report.html"]
    return output.read_text()


def test_page_is_well_formed_and_fetches_nothing(report: str) -> None:
    page = Page(report)
    assert page.open == []
    sources = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href")]
    assert len(sources) == SAMPLES
    assert all(s and s.startswith("data:image/png;base64,") for s in sources)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe"}


def test_scores_stand_beside_their_controls(report: str) -> None:
    table = report[report.index("<table>") : report.index("</table>")]
    rows = re.findall(r'<tr class="(.*?)"><td>(.*?)</td><td class="number">(.*?)</td>.*?<td>(\d+) questions', table)
    assert [(kind, value, count) for kind, _, value, count in rows] == [
        ("", "81.2%", "200"), ("", "79.0%", "50"), ("control", "66.5%", "200"), ("control", "67.0%", "200"),
    ]  # fmt: skip


def test_samples_are_the_first_zero_shot_records_with_the_models_words(report: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ✗" in report
    assert "question 1000?" not in report
    assert [f"question {n}?" in report for n in (0, SAMPLES - 1, SAMPLES)] == [True, True, False]
    assert report.count("✓") == SAMPLES // 2


def test_facts_are_escaped(report: str) -> None:
    assert "<td>2 &lt;cores&gt;</td>" in report


def test_curves_leave_out_what_is_missing() -> None:
    metrics = [{"step": 1, "loss/a": 2.0}, {"step": 2, "loss/a": None, "loss/b": 1.0}, {"step": 2, "validation/a": 3.0}]
    assert curves(metrics, "loss/") == {"a": [(1, 2.0)], "b": [(2, 1.0)]}
    assert curves(metrics, "validation/") == {"a": [(2, 3.0)]}


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_chart_places_values_to_scale() -> None:
    """On a logarithmic axis equal ratios are equal distances; steps are linear from 0."""
    root = drawn(line_chart({"a": [(10, 8.0), (20, 4.0), (40, 2.0)]}, dots={"a": [(40, 2.0)]}, log_y=True))
    line = root.find("polyline")
    assert line is not None
    (x1, y1), (x2, y2), (x3, y3) = (tuple(map(float, p.split(","))) for p in line.attrib["points"].split())
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.2)
    assert y2 > y1  # smaller is lower on the page
    assert x3 - x2 == pytest.approx(2 * (x2 - x1), abs=0.2)
    dot = root.find("circle")
    assert dot is not None
    assert (float(dot.attrib["cx"]), float(dot.attrib["cy"])) == (x3, y3)


def test_chart_marks_and_names() -> None:
    root = drawn(line_chart({"a": [(0, 1.0), (4, 1.0)], "b<": [(0, 1.0), (4, 1.0)]}, marks={2: "resumed"}))
    texts = {t.text: t for t in root.iter("text")}
    assert {"a", "b<", "resumed"} <= set(texts)
    assert abs(float(texts["a"].attrib["y"]) - float(texts["b<"].attrib["y"])) >= 14  # names do not overlap


def test_chart_without_values() -> None:
    assert line_chart({"a": []}) == "<p>no values</p>"
