"""The plots of docs/performance.md's section on a GPU: speed, where the time goes, losses, levers."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import levers
from kit import Figures

Found = dict[str, dict[str, Figures]]  # benchmark → case → figures

# First match counts; names are cuBLAS's, cuDNN's, Transformer Engine's and torch's.
FAMILIES = {
    "attention": r"flash|fmha|sdpa|attention|attn",
    "optimizer": r"adam|multi_tensor|l2norm",
    "loss": r"cross_entropy|softmax|nll",
    "convolutions": r"conv(?!ert)|depthwise|implicit_gemm|im2col",
    "norms": r"norm|ln_(fwd|bwd)",
    "FP8 casts": r"quantize|amax|cast_transpose|fp8|float8|transpose_dbias|scaling",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|matmul|splitk|_mm_",
    "copies": r"memcpy|memset|copy|catarray|permute|fill",
    "elementwise": r"elementwise|vectorized|triton|swiglu|silu|gelu|rope|reduce|scatter|index|gather|bias",
}


def family(kernel: str) -> str:
    return next((name for name, pattern in FAMILIES.items() if re.search(pattern, kernel, re.I)), "other")


def shares(profile: Sequence[Figures]) -> dict[str, float]:
    """Of the GPU's busy time, by family; the rest of the step, in which it waits, as `idle`."""
    whole, *kernels = profile
    found = dict.fromkeys([*FAMILIES, "other", "idle"], 0.0)
    busy = min(1.0, whole["busy_s"] / whole["wall_s"])
    for kernel in kernels:
        found[family(kernel["kernel"])] += kernel["share"] * busy
    found["idle"] = 1 - busy
    found["other"] += max(0.0, 1 - sum(found.values()))
    return {name: share for name, share in found.items() if share > 0.002}


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}%"


def _bars(axes: Any, values: dict[str, float], labels: Sequence[str]) -> None:
    names = list(values)[::-1]
    bars = axes.barh(names, [values[n] for n in names], color="#4c78a8")
    axes.bar_label(bars, list(labels)[::-1], padding=3, fontsize=8)
    axes.margins(x=0.15)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_step(found: Found, figure: Any) -> bool:
    steps = found["step_3b"]
    if steps:
        axes = figure.subplots()
        values = {name: f["tokens_per_s"] / 1000 for name, f in steps.items()}
        _bars(axes, values, [f"{values[name]:.1f}  MFU {percent(f['mfu'])}" for name, f in steps.items()])
        axes.set_xlabel("thousand tokens a second; MFU of the bf16 peak", fontsize=8)
    return bool(steps)


def _draw_where(found: Found, figure: Any) -> bool:
    cases = {**found["step_3b"], **found["moe"]}
    profiles = {name: shares(f["profile"]) for name, f in cases.items() if isinstance(f.get("profile"), list)}
    if not profiles:
        return False
    axes = figure.subplots()
    names = list(profiles)[::-1]
    left = [0.0] * len(names)
    colours = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d")
    kinds = ["matrix products", *(k for k in [*FAMILIES, "other", "idle"] if k != "matrix products")]
    for number_, kind in enumerate(k for k in kinds if any(k in p for p in profiles.values())):
        widths = [100 * profiles[n].get(kind, 0.0) for n in names]
        colour = {"idle": "#dddddd", "other": "#aaaaaa"}.get(kind, colours[number_ % len(colours)])
        axes.barh(names, widths, left=left, label=kind, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("% of a profiled step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return True


def _draw_loss(found: Found, figure: Any) -> bool:
    runs = found["fp8_loss"]
    if not runs:
        return False
    left, right = figure.subplots(1, 2)
    for name, f in runs.items():
        (line,) = left.plot(f["losses"], linewidth=1, label=name)
        plain = runs.get("experts-bf16" if name.startswith("experts") else "bf16")
        if plain and plain is not f:
            apart = [100 * (a / b - 1) for a, b in zip(f["losses"], plain["losses"], strict=False)]
            right.plot(apart, linewidth=1, color=line.get_color())
    left.set_xlabel("step", fontsize=8)
    left.set_title("loss", fontsize=9)
    left.legend(fontsize=7, frameon=False)
    right.axhspan(-1, 1, color="#eeeeee")
    right.set_xlabel("step", fontsize=8)
    right.set_title("% above bf16", fontsize=9)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return True


def _draw_levers(found: Found, figure: Any) -> bool:
    lines = levers.ratios(found["levers"], Path())
    if lines:
        axes = figure.subplots()
        values = {r.what.removeprefix("lever "): 100 * (r.ours / r.other - 1) for r in lines}
        _bars(axes, values, [f"{value:+.1f}%" for value in values.values()])
        axes.set_xlabel("% more tokens a second than the same step without", fontsize=8)
    return bool(lines)


PICTURES: dict[str, Callable[[Found, Any], bool]] = {
    "step": _draw_step, "where": _draw_where, "loss": _draw_loss, "levers": _draw_levers
}  # fmt: skip
ALT = {
    "step": "Tokens a second and MFU of each case",
    "where": "Shares of a step by kind of kernel",
    "loss": "Loss over 200 steps by recipe, and its distance from bf16",
    "levers": "What each lever gives",
}
