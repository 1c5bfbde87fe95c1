"""Line charts as SVG text, with nothing but the standard library."""

import math
from collections.abc import Mapping
from html import escape

COLORS = ("#2f6db3", "#c2542d", "#3f8f5f", "#8456a8", "#a8862a", "#5b6b7a")
Curve = list[tuple[float, float]]  # (step, value)


def line_chart(
    lines: Mapping[str, Curve],
    dots: Mapping[str, Curve] | None = None,
    log_y: bool = False,
    marks: Mapping[int, str] | None = None,
) -> str:
    """An SVG of curves that share both axes; dots of a name take its line's colour, marks are steps with a word."""
    width, height, left, right, top, bottom = 900, 340, 60, 130, 16, 32
    dots, marks = dots or {}, marks or {}
    names = [*lines, *(n for n in dots if n not in lines)]
    points = [p for group in (lines, dots) for curve in group.values() for p in curve if p[1] > 0 or not log_y]
    if not points:
        return "<p>no values</p>"
    scale = math.log10 if log_y else float
    low, high = min(scale(y) for _, y in points), max(scale(y) for _, y in points)
    pad = (high - low) * 0.05 or 0.1
    low, high = low - pad, high + pad
    last = max(x for x, _ in points)

    def px(x: float) -> float:
        return left + x / last * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (scale(y) - low) / (high - low) * (height - top - bottom)

    def text(x: float, y: float, words: str, anchor: str = "start", fill: str = "#5d6b7a") -> str:
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="13">{escape(words)}</text>'
        )

    def rule(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" font-family="system-ui, sans-serif">']
    for y in _log_ticks(low, high) if log_y else _ticks(low, high):
        out.append(rule(left, py(y), width - right, py(y), 'stroke="#e3e8ed"'))
        out.append(text(left - 8, py(y) + 4, f"{y:g}", "end"))
    for x in _ticks(0, last):
        out.append(text(px(x), height - 10, f"{x:g}", "middle"))
    for x, word in marks.items():
        out.append(rule(px(x), top, px(x), height - bottom, 'stroke="#8a97a5" stroke-dasharray="4 4"'))
        out.append(text(px(x) + 5, top + 12, word))
    ends: list[tuple[float, str, str]] = []
    for number, name in enumerate(names):
        color = COLORS[number % len(COLORS)]
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in lines.get(name, []) if y > 0 or not log_y)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        for x, y in dots.get(name, []):
            out.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="4.5" fill="{color}" stroke="#fff"/>')
        ends.append((py((lines.get(name) or dots[name])[-1][1]), name, color))
    # Names stand at their curves' ends, moved down where two would touch.
    free = 0.0
    for end, name, color in sorted(ends):
        place = max(end, free)
        out.append(text(width - right + 8, place + 4, name, fill=color))
        free = place + 15
    return "".join(out) + "</svg>"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten whose logarithm lies in [low, high]."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    return [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= math.log10(m * 10.0**d) <= high]
