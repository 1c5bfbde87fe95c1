"""Histograms of sources as one PNG: a row a measure, a column a source, every row on one scale."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.data.ingest.images import FORMATS
from megatron_mm.data.source import Source
from megatron_mm.errors import UserError

_BINS = 41  # odd: 1:1 stands in the middle of one
_ROOM = 1.45  # height of a histogram's frame over its highest bar: the words stand there
_LONG_TAIL = 8.0  # 99.9% over median, or one source's median over another's; above, the axis is logarithmic
_COLOR, _MEDIAN = "#2f6db3", "#c2542d"


@dataclass(frozen=True)
class Measure:
    """What a row of histograms counts."""

    title: str
    unit: str  # of the axis below
    counted: str  # of the axis at the left
    values: Callable[[Source], np.ndarray]
    log: bool = False  # always; else when the tail is long


def _aspect(source: Source) -> np.ndarray:
    return source.all_meta["width"] / np.maximum(source.all_meta["height"], 1)


MEASURES = (
    Measure("Tokens a document", "tokens", "documents", lambda s: s.lengths),
    Measure("Images a document", "images", "documents", lambda s: s.image_counts),
    Measure("Image width", "pixels", "images", lambda s: s.all_meta["width"], log=True),
    Measure("Image height", "pixels", "images", lambda s: s.all_meta["height"], log=True),
    Measure("Image aspect ratio", "width / height", "images", _aspect, log=True),
    Measure("Image file size", "bytes", "images", lambda s: s.all_meta["nbytes"], log=True),
)


def plot(sources: Sequence[Source], output: Path) -> None:
    """Write the PNG atomically.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "plots need matplotlib", where="--plot", do="pip install 'megatron-mm[plot]', or leave --plot out"
        ) from None

    pictures = any(source.manifest["images"] for source in sources)
    measures = MEASURES if pictures else MEASURES[:1]
    panels = len(measures) + pictures  # formats come last
    # One source fills a page three wide; several stand side by side.
    rows, columns = (-(-panels // 3), min(panels, 3)) if len(sources) == 1 else (panels, len(sources))
    figure = Figure(figsize=(4.6 * columns, 2.7 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for row in range(panels):
        here = [grid.flat[row]] if len(sources) == 1 else list(grid[row])
        for axes in here:
            axes.set_visible(True)
        if row < len(measures):
            _histograms(here, measures[row], sources)
        else:
            _formats(here, sources)
    names = [f"{Path(source.prefix).name} ({source.kind})" for source in sources]
    if len(sources) == 1:
        figure.suptitle(f"{names[0]}: {_counts(sources[0])}", fontweight="bold")
    else:
        for axes, name, source in zip(grid[0], names, sources, strict=True):
            axes.set_title(f"{name}\n{_counts(source)}\n\n{axes.get_title()}", fontsize=10)
    _save(figure, output)


def _counts(source: Source) -> str:
    m = source.manifest
    return f"{m['documents']:,} documents, {m['images']:,} images, {m['tokens']:,} tokens"


def _histograms(row: Sequence[Any], measure: Measure, sources: Sequence[Source]) -> None:
    columns = [np.asarray(measure.values(source)) for source in sources]
    # A source without pictures has nothing to tell about them.
    columns = [values if values.any() else values[:0] for values in columns]
    shown = [values for values in columns if len(values)]
    whole = shown[0].dtype.kind in "iu"
    log = min(values.min() for values in shown) > 0 and (measure.log or _long_tailed(shown))
    edges = _edges(min(v.min() for v in shown), max(v.max() for v in shown), log, whole)
    for axes, values in zip(row, columns, strict=True):
        axes.set_title(measure.title, fontsize=10)
        if not len(values):
            _say_no_images(axes)
            continue
        axes.hist(values, bins=edges, color=_COLOR)
        axes.set_ylim(0, axes.get_ylim()[1] / 1.05 * _ROOM)
        low, median, high = np.percentile(values, [5, 50, 95])
        axes.axvline(median, 0, 1 / _ROOM, color=_MEDIAN, linewidth=1.4)
        axes.axvspan(low, high, 0, 1 / _ROOM, color=_MEDIAN, alpha=0.08, linewidth=0)
        form = (lambda x: f"{x:,.0f}") if whole else (lambda x: f"{x:.2f}")
        told = f"{len(values):,} {measure.counted}, largest {form(values.max())}\n"
        told += f"median {form(median)}, 5% to 95%: {form(low)} to {form(high)}"
        axes.text(0.99, 0.97, told, ha="right", va="top", transform=axes.transAxes, fontsize=8)
        axes.set_xlabel(measure.unit + (", logarithmic" if log else ""), fontsize=9)
        axes.set_ylabel(measure.counted, fontsize=9)
        axes.set_xlim(edges[0], edges[-1])
        _ticks(axes, log, whole)


def _long_tailed(columns: Sequence[np.ndarray]) -> bool:
    medians = [max(1.0, float(np.median(values))) for values in columns]
    tails = [float(np.quantile(values, 0.999)) / median for values, median in zip(columns, medians, strict=True)]
    return max(*tails, max(medians) / min(medians)) > _LONG_TAIL


def _say_no_images(axes: Any) -> None:
    axes.text(0.5, 0.5, "no images", ha="center", va="center", transform=axes.transAxes, color="#8a97a5")
    axes.set_axis_off()


def _ticks(axes: Any, log: bool, whole: bool) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 2000 else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif whole:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    thousands = EngFormatter(sep="")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x:g}" if not whole else thousands(x) if x >= 1 or not x else "")
    )


def _edges(low: float, high: float, log: bool, whole: bool) -> np.ndarray:
    """Borders of the bins; whole numbers never stand on one."""
    low, high = float(low), float(high)
    if log:
        if high < low * 4:  # a scale of a few bins' width would tell nothing
            middle = (low * high) ** 0.5
            low, high = middle / 2, middle * 2
        if whole:
            return np.unique(np.floor(np.geomspace(max(1.0, low), high + 1, _BINS + 1))) - 0.5
        return np.geomspace(low, high * 1.001, _BINS + 1)
    if whole:
        if high - low < 8:
            low, high = max(0.0, low - 4), high + 4
        step = max(1, int(np.ceil((high - low + 1) / _BINS)))
        return np.arange(low - 0.5, high + step + 0.5, step)
    return np.linspace(low, high if high > low else low + 1, _BINS + 1)


def _formats(row: Sequence[Any], sources: Sequence[Source]) -> None:
    from matplotlib.ticker import EngFormatter

    counts = [np.bincount(source.all_meta["format"], minlength=len(FORMATS)) for source in sources]
    there = np.flatnonzero(np.sum(counts, axis=0))
    for axes, of_source in zip(row, counts, strict=True):
        axes.set_title("Image format as stored", fontsize=10)
        if not of_source.any():
            _say_no_images(axes)
            continue
        bars = axes.barh([FORMATS[i] for i in there], of_source[there], height=0.5, color=_COLOR)
        axes.set_ylim(-0.6, len(there) - 0.4)
        told = [f"{n:,} ({n / of_source.sum():.0%})" for n in of_source[there]]
        axes.bar_label(bars, labels=told, padding=3, fontsize=8)
        axes.set_xlim(0, of_source.max() * 1.3)
        axes.set_xlabel("images", fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)


def _save(figure: Any, output: Path) -> None:
    temporary = output.with_name(f"{output.name}.partial-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError("cannot write the plot", where=str(output), found=error.strerror) from None
