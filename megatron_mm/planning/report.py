"""Plans as text for people, as plain data for programs, and as Markdown or one HTML page with a picture."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_mm.config import RunConfig
from megatron_mm.config.nearest import changes
from megatron_mm.errors import UserError
from megatron_mm.planning.hardware import ASSUMPTIONS, GIB
from megatron_mm.planning.picture import MEMORY_PARTS, TIME_PARTS, picture
from megatron_mm.planning.plan import Plan
from megatron_mm.planning.stages import stages

Rows = list[list[str]]


def plan_data(plan: Plan, base: RunConfig) -> dict[str, Any]:
    """A plan as plain data, `base` being the recipe as it was given. docs/planning.md names the keys."""
    p, t = plan.config.parallel, plan.config.training
    return {
        "gpu": plan.target.gpu.name,
        "gpus": plan.target.gpus,
        "layout": {
            **dataclasses.asdict(p),
            "data_parallel_size": plan.data_parallel_size,
            "micro_batch_size": t.micro_batch_size,
            "microbatches": plan.microbatches,
            "recompute": t.recompute,
            "overrides": changes(plan.config, base),
        },
        "fits": plan.fits,
        "usable_bytes": round(plan.target.usable),
        "worst_stage": plan.worst.stage,
        "memory_bytes": [{**dataclasses.asdict(m), "total": m.total} for m in plan.memory],
        "step_seconds": {**dataclasses.asdict(plan.time), "total": plan.time.total},
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
        "images_per_second": plan.images_per_second,
        "images_per_sequence": plan.target.images_per_sequence,
        "days": plan.days,
        "parameters": {"total": plan.parameters.total, "active": plan.parameters.active},
        "measured": plan.measured,
    }


def layout_words(plan: Plan) -> str:
    """The layout in few words: TP4 PP2×2 (22 first) DP32 micro 1."""
    p, t = plan.config.parallel, plan.config.training
    words = [f"TP{p.tensor_model_parallel_size}"]
    if p.pipeline_model_parallel_size > 1:
        virtual = p.virtual_pipeline_model_parallel_size
        words.append(f"PP{p.pipeline_model_parallel_size}" + (f"×{virtual}" if virtual > 1 else ""))
        if p.first_pipeline_stage_layers is not None:
            words.append(f"({p.first_pipeline_stage_layers} first)")
    if p.context_parallel_size > 1:
        words.append(f"CP{p.context_parallel_size}")
    words.append(f"DP{plan.data_parallel_size}")
    if plan.config.model.decoder.moe:
        words.append(f"EP{p.expert_model_parallel_size}")
        words.append(f"ETP{p.expert_tp}")
    words.append(f"micro {t.micro_batch_size}")
    words += ["recompute"] * t.recompute + ["encoder over TP"] * p.vision_tensor_parallel
    return " ".join(words)


def summary(plan: Plan) -> Rows:
    """What a plan says, as pairs."""
    t, size, target = plan.config.training, plan.parameters, plan.target
    active = f", {size.active / 1e9:.2f}B active" if size.active != size.total else ""
    reserve = (target.gpu.memory - target.usable) / GIB
    return [
        ["layout", f"{layout_words(plan)}; {plan.microbatches} microbatches a step"],
        ["model", f"{size.total / 1e9:.2f}B parameters{active}"],
        ["memory", f"{plan.worst.total / GIB:.1f} of {target.usable / GIB:.1f} GiB on the fullest rank (stage "
         f"{plan.worst.stage}); {target.gpu.memory / GIB:.1f} less a reserve of {reserve:.1f}"],
        ["step", f"{plan.time.total:.2f} s; {100 * plan.mfu:.1f}% MFU; {plan.tokens_per_second:,.0f} positions and "
         f"{plan.images_per_second:,.0f} images a second"],
        ["run", f"{t.steps:,} steps in {plan.days:.1f} days"],
        ["images", f"{target.images_per_sequence:.1f} a sequence ({target.images_from}); memory for "
         f"{plan.config.data.max_images}"],
    ]  # fmt: skip


def memory_table(plan: Plan) -> tuple[list[str], Rows]:
    head = ["stage", "layers", *MEMORY_PARTS, "total GiB", "in flight"]
    rows = []
    for m, stage in zip(plan.memory, stages(plan.config), strict=True):
        layers = " + ".join(str(chunk.layers) for chunk in stage)
        holds = "encoder, " * stage[0].first + layers + ", output" * stage[-1].last
        parts = [f"{getattr(m, name) / GIB:.2f}" for name in MEMORY_PARTS]
        rows.append([str(m.stage), holds, *parts, f"{m.total / GIB:.1f}", str(m.in_flight)])
    return head, rows


def time_table(plan: Plan) -> tuple[list[str], Rows]:
    parts = [(name, getattr(plan.time, name)) for name in TIME_PARTS]
    rows = [[name.replace("_", " "), f"{s:.3f}", f"{s / plan.time.total:.1%}"] for name, s in parts if s > 5e-4]
    return ["of a step", "seconds", "share"], rows


def search_table(plans: Sequence[Plan]) -> tuple[list[str], Rows]:
    rows = [
        [
            str(i + 1),
            layout_words(p),
            f"{p.worst.total / GIB:.1f}",
            f"{p.time.total:.2f}",
            f"{p.mfu:.1%}",
            f"{p.days:.1f}",
        ]
        for i, p in enumerate(plans)
    ]
    return ["", "layout", "GiB", "s a step", "MFU", "days"], rows


def text(title: str, plan: Plan, found: Sequence[Plan]) -> str:
    """For a terminal. `found` are a search's layouts, best first."""
    lines = [f"{title} on {plan.target.gpus} × {plan.target.gpu.name}: {'fits' if plan.fits else 'DOES NOT FIT'}", ""]
    lines += [f"{name:8}{words}" for name, words in summary(plan)]
    for head, rows in (memory_table(plan), time_table(plan), *([search_table(found)] if found else [])):
        lines += ["", *_columns(head, rows)]
    if found:
        lines += ["", f"best: {_best(plan, found)}"]
    return "\n".join(lines)


def _columns(head: list[str], rows: Rows) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    left = [any(c.isalpha() for row in rows for c in row[i]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [c.ljust(w) if words else c.rjust(w) for c, w, words in zip(row, widths, left, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown(title: str, plan: Plan, found: Sequence[Plan], command: str, image: str) -> str:
    lines = [f"# {title} on {plan.target.gpus} × {plan.target.gpu.name}: {_verdict(plan)}", "", f"`{command}`", ""]
    lines += [f"- {name}: {words}" for name, words in summary(plan)]
    lines += ["", f"![Memory of each stage and time of a step]({image})"]
    for head, rows in (memory_table(plan), time_table(plan), *([search_table(found)] if found else [])):
        lines += ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]
    if found:
        lines += ["", f"Best: `{_best(plan, found)}`"]
    return "\n".join([*lines, "", _NOTE, ""])


def html(title: str, plan: Plan, found: Sequence[Plan], command: str) -> str:
    head = f"{title} on {plan.target.gpus} × {plan.target.gpu.name}: {_verdict(plan)}"
    parts = [f"<h1>{escape(head)}</h1><p><code>{escape(command)}</code></p>", _html_table([], summary(plan))]
    parts.append(picture(plan))
    parts += [
        _html_table(*t) for t in (memory_table(plan), time_table(plan), *([search_table(found)] if found else []))
    ]
    if found:
        parts.append(f"<p>Best: <code>{escape(_best(plan, found))}</code></p>")
    parts.append(f"<p>{escape(_NOTE)}</p>")
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1d2733}"
        "table{border-collapse:collapse;margin:1.2rem 0}td,th{text-align:left;padding:.2rem 1rem .2rem 0;"
        "border-bottom:1px solid #dde3e9}svg{width:100%;height:auto}"
    )
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(head)}</title><style>{style}</style>'
    return f"{page}<body>{''.join(parts)}</body></html>\n"


def _html_table(head: list[str], rows: Rows) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line(head, 'th') if head else ''}{''.join(line(row, 'td') for row in rows)}</table>"


def _best(plan: Plan, found: Sequence[Plan]) -> str:
    return changes(found[0].config, plan.config) or "the layout as it is"


def _verdict(plan: Plan) -> str:
    return "fits" if plan.fits else "does not fit"


_NOTE = (
    "Memory comes from the real modules on a fake process group; times are a roofline with assumed efficiencies "
    f"({ASSUMPTIONS.matmul:.0%} of peak in matrix products, {ASSUMPTIONS.links:.0%} of the links), not a measurement. "
    "How and with which limits: docs/planning.md."
)


def check_output(output: Path) -> None:
    """Make the report's folder and try to write there, before minutes of planning. Raises UserError."""
    for path in dict.fromkeys((output, _drawing(output))):
        with _writing(path) as temporary:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            temporary.touch()
            temporary.unlink()


def _drawing(output: Path) -> Path:
    """Where the picture goes: a page of HTML holds it itself."""
    return output if output.suffix == ".html" else output.with_suffix(".svg")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A temporary file's name beside `path`, in a folder that is there. A failure is a UserError and leaves no file."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            "cannot write the report", where=str(path), found=f"{error.filename}: {error.strerror}",
            do="take another --output",
        ) from None  # fmt: skip


def write_report(output: Path, title: str, plan: Plan, found: Sequence[Plan], command: str) -> list[Path]:
    """Write OUTPUT (.md, with its picture beside it as .svg; or one .html) and answer with the files written.

    Raises:
        UserError: a file cannot be written.
    """
    if output.suffix == ".html":
        files = {output: html(title, plan, found, command)}
    else:
        drawing = _drawing(output)
        files = {drawing: picture(plan), output: markdown(title, plan, found, command, drawing.name)}
    for path, content in files.items():
        with _writing(path) as temporary:
            temporary.write_text(content)
            os.replace(temporary, path)
    return list(files)
