"""A source's figures as text."""

import numpy as np

from megatron_mm.data.ingest.images import FORMATS, TRANSCODED
from megatron_mm.data.source import Source


def stats(source: Source) -> str:
    """A few lines: counts, lengths, picture sizes."""
    m = source.manifest
    lines = [
        f"{source.prefix}: {source.kind}",
        f"  {m['documents']:,} documents, {m['images']:,} images, {m['tokens']:,} tokens ({m['dtype']})",
        f"  tokens a document: {_spread(source.lengths)}",
        f"  tokenizer: {m['tokenizer']['vocab_size']:,} ids, sha256 {m['tokenizer']['sha256'][:16]}…",
        f"  bytes: {sum(entry['bytes'] for entry in m['files'].values()):,}",
    ]
    if source.has_loss:
        ranges = (source.loss(document) for document in range(len(source)))
        trained = sum(int((one[:, 1] - one[:, 0]).sum()) for one in ranges if one is not None)
        lines.append(f"  trained on: {trained:,} tokens ({trained / m['tokens']:.1%})")
    if m["images"]:
        meta = source.all_meta
        formats = np.bincount(meta["format"], minlength=len(FORMATS))
        named = ", ".join(f"{count:,} {name}" for name, count in zip(FORMATS, formats, strict=True) if count)
        transcoded = int(((meta["flags"] & TRANSCODED) != 0).sum())
        lines += [
            f"  images a document: {_spread(source.image_counts)}",
            f"  width: {_spread(meta['width'])}",
            f"  height: {_spread(meta['height'])}",
            f"  bytes an image: {_spread(meta['nbytes'])}",
            f"  formats: {named}; {transcoded:,} written anew at ingest; {len(np.unique(meta['hash'])):,} different",
        ]
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    low, middle, high, top = np.percentile(values, [5, 50, 95, 100])
    return f"mean {values.mean():,.1f}, 5% {low:,.0f}, median {middle:,.0f}, 95% {high:,.0f}, largest {top:,.0f}"
