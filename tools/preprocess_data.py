"""JSON Lines to a source that training reads (and that stock Megatron-Core reads too).

    python tools/preprocess_data.py --kind caption --input captions.jsonl --output data/captions --tokenizer t.model

    caption      {"image": IMAGE, "text": "…"}
    interleaved  {"content": [{"image": IMAGE} | {"text": "…"}, …]}
    text         {"text": "…"}

IMAGE is a path relative to the file's folder, or {"base64": "…"}. Records that cannot be used are listed with their
reason in OUTPUT.quarantine.jsonl. An older source of the same name is replaced only when the new one is complete.
"""

import argparse
from pathlib import Path

from megatron_mm import __version__
from megatron_mm.config import KINDS
from megatron_mm.data.ingest.build import build_source
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import UserError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="of the files written")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE.model")
    parser.add_argument(
        "--max-bad-rate", type=float, default=0.05, help="share of bad records that stops (default 0.05)"
    )
    parser.add_argument("--max-image-pixels", type=int, default=40_000_000, help="refused above (default 40 million)")
    parser.add_argument("--threads", type=int, help="decoding threads (default: the cores)")
    args = parser.parse_args()
    if not 0 <= args.max_bad_rate <= 1:
        raise UserError("is a share", where="--max-bad-rate", found=args.max_bad_rate, allowed="0 to 1")
    for name in ("max_image_pixels", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError("out of range", where=f"--{name.replace('_', '-')}", found=value, allowed="1 or more")
    summary = build_source(
        args.input,
        args.output,
        args.kind,
        Tokenizer(args.tokenizer),
        max_bad_rate=args.max_bad_rate,
        max_image_pixels=args.max_image_pixels,
        threads=args.threads,
        made={"tool": "preprocess_data.py", "version": __version__, "inputs": [str(path) for path in args.input]},
    )
    print(
        f"{args.output}: {summary.documents} documents, {summary.images} images, {summary.tokens} tokens "
        f"in {summary.seconds:.1f} s"
    )
    if summary.bad:
        print(f"  {summary.bad} bad records, see {args.output}.quarantine.jsonl:")
        for reason, count in sorted(summary.reasons.items(), key=lambda item: -item[1]):
            print(f"  {count:>8} × {reason}")


if __name__ == "__main__":
    run_cli(main)
