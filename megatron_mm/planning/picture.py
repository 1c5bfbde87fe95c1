"""A plan as one SVG: memory of each stage's rank as stacked bars under the GPU's limit, and a step's time as a bar."""

from collections.abc import Sequence
from html import escape

from megatron_mm.evaluation.charts import COLORS
from megatron_mm.planning.hardware import GIB
from megatron_mm.planning.plan import Plan

MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations", "working", "inputs")
TIME_PARTS = (
    "decoder", "encoder", "memory_bound", "tensor_parallel", "expert_parallel", "pipeline_messages", "imbalance",
    "bubble", "data_parallel", "optimizer",
)  # fmt: skip
_PALETTE = (*COLORS, "#4aa3a2", "#b04a7a", "#7d8c2f", "#a9b4bf")
_WIDTH, _LEFT, _RIGHT, _BAR, _STEP = 900, 80, 70, 20, 26
_INK, _SOFT = "#1d2733", "#5d6b7a"


def picture(plan: Plan) -> str:
    """A whole SVG file."""
    stages = [[getattr(m, name) / GIB for name in MEMORY_PARTS] for m in plan.memory]
    limit, offered = plan.target.usable / GIB, plan.target.gpu.memory / GIB
    most = max(offered, *(sum(parts) for parts in stages))
    top = 74
    bottom = top + _STEP * len(stages)
    out = [_text(0, 18, "Memory of a rank of each pipeline stage, GiB", fill=_INK), *_legend(MEMORY_PARTS, 32)]
    for row, parts in enumerate(stages):
        out += _bar(f"stage {row}", parts, top + row * _STEP, most, f"{sum(parts):.1f}")
    for value, words in ((limit, f"usable {limit:.0f}"), (offered, f"memory {offered:.0f}")):
        x = _LEFT + value / most * (_WIDTH - _LEFT - _RIGHT)
        out.append(
            f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{bottom}" stroke="{_INK}" stroke-dasharray="4 3"/>'
        )
        out.append(_text(x, bottom + 14, words, "middle"))
    at = bottom + 52
    times = [getattr(plan.time, name) for name in TIME_PARTS]
    out += [_text(0, at, "A step, seconds", fill=_INK), *_legend(TIME_PARTS, at + 14)]
    out += _bar("step", times, at + 62, plan.time.total, f"{plan.time.total:.2f}")
    height = at + 62 + _STEP + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif"><rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
        + "".join(out)
        + "</svg>\n"
    )


def _bar(name: str, parts: Sequence[float], y: float, most: float, total: str) -> list[str]:
    out, x = [_text(_LEFT - 8, y + 15, name, "end")], float(_LEFT)
    for number, value in enumerate(parts):
        width = value / most * (_WIDTH - _LEFT - _RIGHT)
        if width > 0:
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{_PALETTE[number]}" '
                f'stroke="#fff" stroke-width="0.5"><title>{value:.3g}</title></rect>'
            )
        x += width
    return [*out, _text(x + 6, y + 15, total, fill=_INK)]


def _legend(names: Sequence[str], y: float) -> list[str]:
    out, x, line = [], float(_LEFT), 0
    for number, name in enumerate(names):
        words = name.replace("_", " ")
        width = 34 + 7.5 * len(words)
        if x + width > _WIDTH:
            x, line = float(_LEFT), line + 1
        out.append(f'<rect x="{x:.1f}" y="{y + 18 * line}" width="11" height="11" fill="{_PALETTE[number]}"/>')
        out.append(_text(x + 16, y + 18 * line + 10, words))
        x += width
    return out


def _text(x: float, y: float, words: str, anchor: str = "start", fill: str = _SOFT) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="13">{escape(words)}</text>'
