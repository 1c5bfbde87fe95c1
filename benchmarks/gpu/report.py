"""Results on a GPU as pages: docs/performance.md's section, plots, and the JSON files of benchmarks/results.

    python benchmarks/gpu/report.py [FILE.tar.gz | FOLDER]… [--results DIR] [--docs DIR]

Takes over what the archives of `run.sh` have, writes DOCS/images/gpu-*.png (matplotlib: the extra `dev`), and puts the
section between two marks of DOCS/performance.md, at its end the first time. What was not measured is left out; what was
missed stands there as missed, with the kernels that take the time.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cases import Ratio
from gather import merge
from kit import RESULTS, ROOT, Figures, load, write
from pictures import ALT, PICTURES, Found, percent

BEGIN, END = "<!-- gpu: written by benchmarks/gpu/report.py -->", "<!-- gpu: end -->"
SCRIPTS = ("ceilings", "step_3b", "vit", "attention", "decode", "data_wait", "memory", "fp8_loss", "moe", "levers")
Rows = list[list[str]]


def table(heads: Sequence[str], rows: Rows) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def number(value: Any, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


class Report:
    """All finished cases of a folder, and the sections made of them."""

    def __init__(self, results: Path, images: Path) -> None:
        self.results, self.images = results, images
        self.found: Found = {
            name: {n: f for n, f in load(results, name).items() if "skipped" not in f} for name in SCRIPTS
        }  # fmt: skip

    def ratios(self, name: str) -> list[Ratio]:
        """As the script itself states them, of everything that is there now."""
        lines: list[Ratio] = importlib.import_module(name).ratios(self.found[name], self.results)
        return lines

    def machine(self) -> str:
        machines = []
        for path in sorted(self.results.glob("gpu-*.json")):
            machine = json.loads(path.read_text()).get("machine")
            if machine and machine.get("gpu") and machine not in machines:
                machines.append(machine)
        if not machines:
            return ""
        last = machines[-1]
        dates = sorted({m["date"] for m in machines})
        versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        gpu = f"{last['gpu']} ({last['gpu_gib']} GiB, driver {last['driver']}, CUDA {last['cuda']})"
        return f"One {gpu}, {last['cores']} CPU cores, {when}. {versions}."

    def targets(self) -> str:
        rows: Rows = []
        for name in SCRIPTS:
            for ratio in self.ratios(name):
                if ratio.target != "reported":
                    ours = f"{number(ratio.ours)} {ratio.ours_is}"
                    other = f"{number(ratio.other)} {ratio.other_is}"
                    verdict = "reached" if ratio.reached else "**missed**"
                    rows.append([ratio.what, ours, other, number(ratio.ours / ratio.other), ratio.target, verdict])
        return table(["", "measured", "beside", "ratio", "target", ""], rows) if rows else ""

    def ceilings(self) -> str:
        found = self.found["ceilings"]
        said = [f"{found[n]['best_tflops']:.0f} TFLOP/s in {label}" for n, label in _PRODUCTS.items() if n in found]
        text = "Ceilings here: matrix products of " + " and ".join(said) if said else ""
        if "copy" in found:
            text += f"; a copy moves {found['copy']['bytes_per_s'] / 1e12:.2f} TB/s, read and written."
        return text

    def steps(self) -> str:
        heads = ["", "tokens/s", "images/s", "s a step (spread)", "TFLOP/s", "MFU", "peak GiB", "GPU busy"]
        rows: Rows = []
        for name, f in {**self.found["step_3b"], **self.found["moe"]}.items():
            profile = f.get("profile")
            busy = profile[0]["busy_s"] / profile[0]["wall_s"] if isinstance(profile, list) else None
            each = f["seconds_per_step"]
            seconds = f"{each['median']:.3f} ({percent(each['spread'], 0)})"
            figures = [number(f["tokens_per_s"]), number(f["images_per_s"]), seconds, number(f["tflops"])]
            rows.append([name, *figures, percent(f["mfu"]), number(f.get("peak_gib")), percent(busy, 0)])
        return table(heads, rows) if rows else ""

    def simple(self, name: str, columns: dict[str, Callable[[Figures], str]]) -> str:
        rows = [[case, *(column(f) for column in columns.values())] for case, f in self.found[name].items()]
        return table(["", *columns], rows) if rows else ""

    def reported(self, name: str) -> str:
        """Lines without a target."""
        return "\n".join(f"- {r}" for r in self.ratios(name) if r.target == "reported").replace(
            " (target reported)", ""
        )

    def kernels(self) -> str:
        """Of the cases whose target is missed: where the time goes."""
        missed = {r.what for name in ("step_3b", "moe") for r in self.ratios(name) if not r.reached}
        texts = []
        for name, figures in self.found["step_3b"].items():
            profile = figures.get("profile")
            if isinstance(profile, list) and any(what.split(" ")[0] in name for what in missed):
                rows = [[f"`{k['kernel'][:80]}`", percent(k["share"]), str(k["calls"])] for k in profile[1:11]]
                texts.append(f"{name}:\n\n" + table(["kernel", "share of busy time", "calls"], rows))
        return "\n\n".join(texts)

    def tests(self) -> str:
        path = self.results / "gpu-tests.json"
        cases = json.loads(path.read_text())["cases"] if path.exists() else {}
        outcomes = [case["outcome"] for case in cases.values()]
        lines = [", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped")) + "."] if cases else []
        lines += [f"- failed: `{name}`" for name, case in cases.items() if case["outcome"] == "failed"]
        return "\n".join(lines)

    def section(self) -> str:
        pictures = {name: self._draw(name, draw) for name, draw in PICTURES.items()}
        parts = [
            ("", "\n\n".join(filter(None, [self.machine(), self.ceilings()]))),
            ("Targets", self.targets()),
            ("MM1-3B at 4096 positions: `gpu-step_3b`, `gpu-moe`", self.steps() + pictures["step"]),
            ("Where the time goes", pictures["where"].strip()),
            ("What takes longest where a target is missed", self.kernels()),
            ("Levers: `gpu-levers`", self.reported("levers") + pictures["levers"]),
            ("FP8's loss beside bf16's: `gpu-fp8_loss`", pictures["loss"].strip()),
            ("The encoder alone: `gpu-vit`", self.simple("vit", _VIT) + _then(self.reported("vit"))),
            ("Attention kernels: `gpu-attention`", self.simple("attention", _ATTENTION)),
            ("Decoding: `gpu-decode`", self.simple("decode", _DECODE) + _then(self.reported("decode"))),
            ("Memory beside the plan: `gpu-memory`", self.simple("memory", _MEMORY)),
            ("Tests: `gpu-tests`", self.tests()),
        ]
        text = "\n\n".join((f"### {head}\n\n" if head else "") + body for head, body in parts if body.strip())
        return f"{BEGIN}\n## On a GPU\n\n{text}\n{END}"

    def _draw(self, name: str, draw: Callable[[Found, Any], bool]) -> str:
        """Markdown that shows the picture; nothing where there is nothing to draw."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.6), layout="constrained")
        if not draw(self.found, figure):
            return ""
        self.images.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.images / f"gpu-{name}.png", dpi=110)
        return f"\n\n![{ALT[name]}](images/gpu-{name}.png)"


def _then(text: str) -> str:
    return f"\n\n{text}" if text else ""


_PRODUCTS = {"bf16": "bf16", "fp8": "FP8"}
_VIT: dict[str, Callable[[Figures], str]] = {
    "images/s": lambda f: number(f["images_per_s"]),
    "TFLOP/s": lambda f: number(f["tflops"]),
    "MFU": lambda f: percent(f["mfu"]),
}
_ATTENTION: dict[str, Callable[[Figures], str]] = {
    "TFLOP/s": lambda f: number(f["tflops"]),
    "ms": lambda f: number(1e3 * f["seconds"]["median"]),
    "chosen": lambda f: f.get("chosen", ""),
}
_DECODE: dict[str, Callable[[Figures], str]] = {"images/s": lambda f: number(f["images_per_s"])}
_MEMORY: dict[str, Callable[[Figures], str]] = {
    "planned GiB": lambda f: number(f["planned_gib"]["total"], 4),
    "peak GiB": lambda f: number(f["peak_gib"], 4),
    "peak / plan": lambda f: number(f["peak_over_plan"], 4),
    "taken of the GPU, GiB": lambda f: number(f["taken_of_the_gpu_gib"], 4),
}


def tidy(results: Path) -> None:
    """Of what failed keep the last line that it said, without the folders of the machine that it was on."""
    for path in results.glob("gpu-*.json"):
        record = json.loads(path.read_text())
        for case in record["cases"].values():
            for key in {"failed", "why"} & case.keys():
                lines = [x for x in case[key].splitlines() if x.strip() and not x.startswith("exit code")]
                case[key] = re.sub(r"(?<!\w)/(?:[\w.+@-]+/)+", "", (lines or [case[key]])[-1].strip())[:300]
        write(path, record)


def put(page: Path, section: str) -> None:
    """Between the marks of the page; at its end where it has none."""
    text = page.read_text()
    if BEGIN in text:
        before, rest = text.split(BEGIN, 1)
        text = before + section + rest.split(END, 1)[1]
    else:
        text = text.rstrip("\n") + f"\n\n{section}\n"
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", nargs="*", type=Path, help="archives of run.sh, or folders with gpu-*.json")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of performance.md")
    args = parser.parse_args()
    for path in args.raw:
        if not path.exists():
            sys.exit(f"error: {path}: no such file or folder")
    args.results.mkdir(parents=True, exist_ok=True)
    merge(args.results, args.raw)
    tidy(args.results)
    report = Report(args.results, args.docs / "images")
    if not any(report.found.values()):
        sys.exit(f"error: {args.results} has no finished case of a GPU benchmark\n  do: name the archive of run.sh")
    put(args.docs / "performance.md", report.section())
    for path in sorted(args.results.glob("gpu-*.json")):
        print(path)
    print(args.docs / "performance.md")


if __name__ == "__main__":
    main()
