"""What teams have to a source that training reads (and that stock Megatron-Core reads too).

    python tools/preprocess_data.py --kind caption --input captions.jsonl --output data/captions --tokenizer t.model
    python tools/preprocess_data.py --format webdataset --input 'laion/*.tar' --output data/laion --tokenizer t.model
    python tools/preprocess_data.py --format obelics --input obelics --filter mm1 --output data/web --tokenizer t.model

Many machines: mpiexec -n 33 (or srun --mpi=pmi2 -n 33) before the same line; rank 0 deals, the others work.

Records that cannot be used are listed with their reason in OUTPUT.quarantine.jsonl. Finished shards stay in
OUTPUT.shards until all are done: after a kill the same command continues there. An older source of the same name is
replaced only when the new one is complete. The result is the same, byte for byte, for any number of workers.
docs/data.md tells the formats.
"""

import argparse
import glob
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megatron_mm import __version__
from megatron_mm.config import KINDS, Kind
from megatron_mm.data.ingest import Format
from megatron_mm.data.ingest.build import Summary, build_source
from megatron_mm.data.ingest.filters import Filters
from megatron_mm.data.ingest.formats import FORMATS
from megatron_mm.data.ingest.ranks import run, world
from megatron_mm.data.ingest.shards import CONTINUE
from megatron_mm.data.ingest.workers import Processes, Team
from megatron_mm.data.tokenizer import open_tokenizer
from megatron_mm.errors import UserError, run_cli


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="jsonl", help="of the input (default jsonl)")
    parser.add_argument("--kind", choices=KINDS, help="of the source; may be left out where the format has only one")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or patterns (*.tar)")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="of the files written")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="PATH", help="its file or folder")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument(
        "--max-bad-rate", type=float, default=0.05, metavar="SHARE", help="of bad records, that stops (default 0.05)"
    )
    parser.add_argument(
        "--max-image-pixels", type=int, default=40_000_000, metavar="N", help="refused above (default 40 million)"
    )
    add = parser.add_argument_group("filters (nothing is filtered unless asked for)").add_argument
    add("--filter", choices=("mm1",), help="MM1's rules for interleaved documents; the others change single ones")
    rules: dict[str, dict[str, Any]] = {
        "--drop-corrupt-images": {"help": "instead of putting their document aside; mm1: yes"},
        "--min-image-side": {"type": int, "help": "pixels; mm1: 100"},
        "--max-image-side": {"type": int, "help": "pixels; mm1: 10000"},
        "--max-image-aspect": {"type": float, "help": "longer side / shorter side; mm1: 2"},
        "--url-words": {"type": str, "help": "that no image URL may hold; mm1: logo,button,icon,plugin,widget"},
        "--first-on-page": {"help": "keep one of the same images of a document; mm1: yes"},
        "--max-image-repeats": {"type": int, "help": "images that the whole input has more often go; mm1: 10"},
        "--min-document-images": {"type": int, "help": "of those left; mm1: 1"},
        "--max-document-images": {"type": int, "help": "mm1: 30"},
    }
    for name, options in rules.items():
        if "type" in options:
            options |= {"type": _or_none(options["type"]), "metavar": "N" if options["type"] is not str else "WORD,…"}
        else:
            options["action"] = argparse.BooleanOptionalAction
        add(name, default=argparse.SUPPRESS, **options)
    parser.epilog = "A filter's number or words may be none: the rule is off."
    return parser.parse_args()


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        return None if text == "none" else read(text)

    value.__name__ = read.__name__  # argparse tells it
    return value


def _filters(args: argparse.Namespace) -> Filters:
    """The rules asked for, checked."""
    given = {f.name: getattr(args, f.name) for f in fields(Filters) if hasattr(args, f.name)}
    for name, value in given.items():
        least = {"min_document_images": 0, "max_document_images": 0, "max_image_aspect": 1.0}.get(name, 1)
        if isinstance(value, int | float) and not isinstance(value, bool) and not value >= least:
            raise UserError("out of range", where=_option(name), found=value, allowed=f"{least} or more, or none")
    if "url_words" in given:
        given["url_words"] = tuple(word for word in (given["url_words"] or "").split(",") if word)
    if given.get("min_document_images", 0) is None:
        given["min_document_images"] = 0
    return replace(Filters.mm1() if args.filter else Filters(), **given)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(args: argparse.Namespace, format: Format) -> Kind:
    if not args.kind and len(format.kinds) > 1:
        raise UserError("is needed", where="--kind", found=f"--format {format.name}", allowed=" or ".join(format.kinds))
    if args.kind and args.kind not in format.kinds:
        raise UserError(
            f"is not what --format {format.name} gives", where="--kind", found=args.kind,
            allowed=" or ".join(format.kinds),
        )  # fmt: skip
    return args.kind or format.kinds[0]


_FILES = {  # of a folder, by format; html looks into it by itself
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "webdataset": (".tar",),
    "parquet": (".parquet",),
    "obelics": (".parquet",),
    "mmc4": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zip"),
    "coco": (".json",),
    "llava": (".json", ".jsonl"),
}


def _inputs(patterns: list[str], format: str) -> list[Path]:
    """Files in the order given; what a pattern matches or a folder holds, by name."""
    paths: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if not path.exists() and glob.has_magic(pattern):
            found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
            if not found:
                raise UserError("no file matches this pattern", where="--input", found=pattern)
            paths += found
        else:
            paths.append(path)
    return [file for path in paths for file in _files(path, format)]


def _files(path: Path, format: str) -> list[Path]:
    if format not in _FILES or not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.name.endswith(_FILES[format]) and file.is_file())
    if not found:
        raise UserError(
            "no file of this format in the folder", where=str(path), found=f"--format {format}",
            allowed=" or ".join("*" + ending for ending in _FILES[format]),
        )  # fmt: skip
    return found


def _build(args: argparse.Namespace, team: Team) -> None:
    if not 0 <= args.max_bad_rate <= 1:
        raise UserError("is a share", where="--max-bad-rate", found=args.max_bad_rate, allowed="0 to 1")
    for name in ("max_image_pixels", "workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError("out of range", where=_option(name), found=value, allowed="1 or more")
    format, filters = FORMATS[args.format], _filters(args)
    made = {"tool": "preprocess_data.py", "version": __version__, "format": args.format, "inputs": args.input}
    if filters != Filters():
        made["filters"] = asdict(filters)
    summary = build_source(
        _inputs(args.input, args.format),
        args.output,
        _kind(args, format),
        open_tokenizer(args.tokenizer),
        format=format,
        filters=filters,
        max_bad_rate=args.max_bad_rate,
        max_image_pixels=args.max_image_pixels,
        team=team,
        made=made,
    )
    print(_told(summary, args.output))


def _told(summary: Summary, output: Path) -> str:
    again = f", {summary.reused} of {summary.shards} shards made before" if summary.reused else ""
    lines = [
        f"{output}: {summary.documents} documents, {summary.images} images, {summary.tokens} tokens "
        f"in {summary.seconds:.1f} s{again}"
    ]
    for what, counts in (
        ("images filtered", summary.filtered_images),
        ("documents filtered", summary.filtered_documents),
        (f"bad records, see {output}.quarantine.jsonl", summary.reasons),
    ):
        if counts:
            lines.append(f"  {sum(counts.values())} {what}:")
            lines += [f"  {count:>8} × {reason}" for reason, count in counts.items()]
    lines += [f"  damaged, read up to here: {where}" for where in summary.damaged]
    return "\n".join(lines)


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    print(f"stopped by {signal.Signals(number).name}; {CONTINUE}", file=sys.stderr)
    raise SystemExit(128 + number)


def main() -> int:
    signal.signal(signal.SIGTERM, _stop)
    try:
        if (comm := world()) is None:
            args = _parse()
            _build(args, Processes(args.workers))
        else:
            run(comm, _on_rank_0)
    except KeyboardInterrupt:
        print(f"stopped; {CONTINUE}", file=sys.stderr)
        return 130
    return 0


def _on_rank_0(team: Team) -> None:
    args = _parse()
    if args.workers is not None:
        raise UserError("is for one process: here the ranks are the workers", where="--workers", found=args.workers)
    _build(args, team)


if __name__ == "__main__":
    run_cli(main)
