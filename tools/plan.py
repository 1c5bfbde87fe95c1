"""What a recipe needs on given GPUs, before any of them is rented.

    python tools/plan.py --config examples/mm1/mm1-30b.yaml --gpus 256 --gpu h100 --search

Memory of a rank of every pipeline stage, whether it fits, seconds a step, and with --search the fastest layouts that
fit. Needs no GPU. See docs/planning.md.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from megatron_mm.config.nearest import changes, load_for
from megatron_mm.errors import UserError, run_cli
from megatron_mm.planning.hardware import GIB, GPUS
from megatron_mm.planning.plan import Plan, check_gpu, make_plans, target_for
from megatron_mm.planning.report import check_output, plan_data, text, write_report
from megatron_mm.planning.search import nearest_that_fit, search


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a run as YAML")
    parser.add_argument("--gpus", required=True, type=int, help="how many")
    parser.add_argument("--gpu", required=True, choices=GPUS)
    parser.add_argument("--search", action="store_true", help="look for the fastest layouts that fit")
    parser.add_argument(
        "--images-per-sequence", type=float, help="mean over the data; default: from the sources' manifests"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, help="also write a report: FILE.md (and FILE.svg) or FILE.html")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="fields of the config to change")
    arguments = parser.parse_args()
    _check(arguments)
    config = load_for(arguments.config, arguments.overrides, arguments.gpus)
    check_gpu(config, GPUS[arguments.gpu])
    target = target_for(config, GPUS[arguments.gpu], arguments.gpus, arguments.images_per_sequence)
    if target.images_per_sequence > config.data.max_images:
        raise UserError(
            "more images than a sequence may hold", where="--images-per-sequence", found=target.images_per_sequence,
            allowed=f"up to data.max_images, {config.data.max_images}",
        )  # fmt: skip
    if arguments.output:
        check_output(arguments.output)
    found = search(config, target) if arguments.search else []
    (plan,) = make_plans([config], target)
    title = Path(arguments.config).stem
    if arguments.json:
        print(json.dumps({"plan": plan_data(plan, config), "search": [plan_data(p, config) for p in found]}, indent=2))
    else:
        print(text(title, plan, found))
    if arguments.output:
        command = shlex.join(["python", "tools/plan.py", *sys.argv[1:]])
        for path in write_report(arguments.output, title, plan, found, command):
            print(f"wrote {path}", file=sys.stderr)
    if not plan.fits and not found:
        raise _does_not_fit(plan)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.gpus < 1:
        raise UserError("out of range", where="--gpus", found=arguments.gpus, allowed="1 or more")
    images = arguments.images_per_sequence
    if images is not None and not images >= 0:  # nan too
        raise UserError("out of range", where="--images-per-sequence", found=images, allowed="0 or more")
    if arguments.output and arguments.output.suffix not in (".md", ".html"):
        raise UserError(
            "no such kind of report", where="--output", found=arguments.output, allowed="FILE.md, FILE.html"
        )


def _does_not_fit(plan: Plan) -> UserError:
    near = nearest_that_fit(plan.config, plan.target)
    listed = "".join(
        f"\n    {changes(p.config, plan.config)}   ({p.worst.total / GIB:.1f} GiB, {p.time.total:.2f} s a step)"
        for p in near
    )
    return UserError(
        f"does not fit into {plan.target.gpu.name}", where="parallel",
        found=f"{plan.worst.total / GIB:.1f} GiB on a rank of stage {plan.worst.stage}",
        allowed=f"{plan.target.usable / GIB:.1f} GiB",
        do=f"take one of the nearest layouts that fit (by formula), or the fastest by --search:{listed}",
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
