"""One HTML page about a run that opens anywhere: curves as inline SVG, pictures inline, no script, nothing fetched.

`write_report` reads what a run and `tools/evaluate.py` left behind: RUN_DIR/metrics.jsonl, RUN_DIR/config.yaml, the
scores, and the records of single questions.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_mm.config import dump_yaml, load_config
from megatron_mm.evaluation.charts import Curve, line_chart

SAMPLES = 24  # the first ones of the evaluation's random sample: neither chosen nor sorted

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5d6b7a; --line: #dde3e9; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.4rem }
p.note, figcaption { color: var(--soft); font-size: .9rem } figure { margin: 1rem 0 } svg { width: 100%; height: auto }
table { border-collapse: collapse } td, th { text-align: left; padding: .3rem 1.2rem .3rem 0; vertical-align: top }
tr { border-bottom: 1px solid var(--line) } td.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { width: 18rem; background: #eef2f5 } .bar i { display: block; height: .9rem; background: #2f6db3 }
.control .bar i { background: #a9b4bf } .control { color: var(--soft) }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: .8rem }
.sample { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; display: flex; gap: .7rem }
.sample { font-size: .9rem }
.sample img { width: 80px; height: 80px; object-fit: contain; flex: none }
.right b { color: #2c7a4b } .wrong b { color: #b3372f }
pre { font-size: .8rem; background: #f5f7f9; padding: 1rem; overflow: auto }
"""


def write_report(
    output: Path, *, title: str, run_dir: Path, scores: Mapping[str, Any], records: Path, facts: Mapping[str, str]
) -> None:
    """Write the page atomically.

    Args:
        output: the HTML file.
        run_dir: a training run, for its metrics.jsonl and config.yaml.
        scores: as `evaluate_vqa` gives them; `resumed_at_step`, if there, is marked in the curves.
        records: JSONL of single questions, as `tools/evaluate.py --records` writes it.
        facts: what else should be told of the run, by name: machine, versions, seconds.
    """
    metrics = _read_jsonl(run_dir / "metrics.jsonl")
    config = load_config(run_dir / "config.yaml")
    marks = {scores["resumed_at_step"]: "resumed"} if "resumed_at_step" in scores else {}
    training, validation = curves(metrics, "loss/"), curves(metrics, "validation/")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(_summary(metrics, training))}</p>',
        "<h2>What it learned</h2>",
        _scores(scores),
        "<h2>Questions it had not seen</h2>",
        f'<p class="note">The first {SAMPLES} questions of the random sample, at 0 shots.</p>',
        _samples([r for r in _read_jsonl(records) if r["stage"] == "0-shot"][:SAMPLES]),
        "<h2>Loss</h2>",
        _figure(
            line_chart(training, dots=validation, log_y=True, marks=marks),
            "Next-token loss on text a source (lines: training; dots: held-out documents), logarithmic, against steps.",
        ),
        "<h2>Throughput</h2>",
        _figure(
            line_chart(
                {
                    name: curve
                    for name, curve in curves(metrics, "").items()
                    if name in ("tokens_per_s", "images_per_s")
                },
                log_y=True,
                marks=marks,
            ),
            "Sequence positions and images a second, all ranks together, logarithmic.",
        ),
        "<h2>The run</h2>",
        _table(facts),
        f"<h2>Configuration</h2><pre>{escape(dump_yaml(config))}</pre>",
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    page += f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    temporary.write_text(page)
    os.replace(temporary, output)


def curves(metrics: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, Curve]:
    """Metrics `prefixNAME` as NAME → (step, value) pairs; missing and null values are left out."""
    found: dict[str, Curve] = {}
    for line in metrics:
        for name, value in line.items():
            if name.startswith(prefix) and name not in ("step", "time") and value is not None:
                found.setdefault(name.removeprefix(prefix), []).append((line["step"], value))
    return found


def _summary(metrics: Sequence[Mapping[str, Any]], training: Mapping[str, Curve]) -> str:
    rates = [m for m in metrics if "tokens_per_s" in m]
    steps = max((m["step"] for m in metrics), default=0)
    mean = {k: sum(m[k] for m in rates) / len(rates) for k in ("tokens_per_s", "images_per_s")} if rates else {}
    speed = "".join(f"; {v:,.0f} {k.removesuffix('_per_s')}/s" for k, v in mean.items())
    return f"{steps} steps on {', '.join(training)}{speed} on average."


def _scores(scores: Mapping[str, Any]) -> str:
    counts = scores.get("n_by_shots", {})
    rows = [
        (f"{shots}-shot", value, counts.get(shots, scores["n"]), "") for shots, value in scores["vqa_accuracy"].items()
    ]
    rows += [
        ("control: another question's picture", scores["vqa_accuracy_shuffled"], scores["n"], "control"),
        ("control: most frequent answer, no picture", scores["vqa_accuracy_question_only"], scores["n"], "control"),
    ]
    body = "".join(
        f'<tr class="{kind}"><td>{escape(name)}</td><td class="number">{value:.1%}</td>'
        f'<td><div class="bar"><i style="width:{value:.1%}"></i></div></td><td>{count} questions</td></tr>'
        for name, value, count, kind in rows
    )
    note = (
        "VQA accuracy on held-out pictures. What the model sees is the distance between the bars and the grey controls."
    )
    return f'<table>{body}</table><p class="note">{note}</p>'


def _samples(records: Sequence[Mapping[str, Any]]) -> str:
    cards = []
    for record in records:
        right = record["correct"] >= 0.5
        cards.append(
            f'<div class="sample {"right" if right else "wrong"}"><img src="{_inline(Path(record["image"]))}" alt="">'
            f"<div>{escape(record['question'])}<br>answer: {escape(record['answer'])}<br>"
            f"model: <b>{escape(record['prediction'])} {'✓' if right else '✗'}</b></div></div>"
        )
    return f'<div class="samples">{"".join(cards)}</div>'


def _inline(image: Path) -> str:
    kind = {".jpg": "jpeg", ".jpeg": "jpeg"}.get(image.suffix.lower(), image.suffix.lower().lstrip("."))
    return f"data:image/{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    return f"<table>{rows}</table>"


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
