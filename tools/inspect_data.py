"""Look into a source.

python tools/inspect_data.py stats PREFIX …    counts, lengths, picture sizes
python tools/inspect_data.py verify PREFIX …   read everything: digests, ids, each picture's crc32
"""

import argparse

import numpy as np

from megatron_mm.data.ingest.images import FORMATS, TRANSCODED
from megatron_mm.data.source import Source, verify_source
from megatron_mm.errors import run_cli


def _spread(values: np.ndarray) -> str:
    low, middle, high, top = np.percentile(values, [5, 50, 95, 100])
    return f"mean {values.mean():.1f}, 5% {low:.0f}, median {middle:.0f}, 95% {high:.0f}, longest {top:.0f}"


def stats(prefix: str) -> str:
    source = Source(prefix)
    m = source.manifest
    lines = [
        f"{prefix}: {source.kind}",
        f"  {m['documents']} documents, {m['images']} images, {m['tokens']} tokens ({m['dtype']})",
        f"  tokens a document: {_spread(source.lengths)}",
        f"  tokenizer: {m['tokenizer']['vocab_size']} ids, sha256 {m['tokenizer']['sha256'][:16]}…",
        f"  bytes: {sum(entry['bytes'] for entry in m['files'].values())}",
    ]
    if m["images"]:
        meta = source.all_meta
        formats = np.bincount(meta["format"], minlength=len(FORMATS))
        named = ", ".join(f"{count} {name}" for name, count in zip(FORMATS, formats, strict=True) if count)
        transcoded = int(((meta["flags"] & TRANSCODED) != 0).sum())
        lines += [
            f"  images a document: {_spread(source.image_counts)}",
            f"  width: {_spread(meta['width'])}",
            f"  height: {_spread(meta['height'])}",
            f"  formats: {named}; {transcoded} written anew at ingest; {len(np.unique(meta['hash']))} different",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("stats", "verify"))
    parser.add_argument("prefix", nargs="+", metavar="PREFIX")
    args = parser.parse_args()
    for prefix in args.prefix:
        if args.command == "stats":
            print(stats(prefix))
        else:
            source = verify_source(prefix)
            print(f"{prefix}: whole; {len(source)} documents, {source.manifest['images']} images")


if __name__ == "__main__":
    run_cli(main)
