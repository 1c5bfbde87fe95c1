"""The files of a source: names, formats, versions. What `source` reads and `source_writer` writes.

    X.text.{bin,idx}    one sequence a document: bos, tokens with one image id at each picture's place, eos
    X.image.{bin,idx}   one sequence a picture, its encoded bytes; its document_indices run parallel to the text's,
                        so document d owns pictures [di[d], di[d + 1]). Absent when no document has a picture.
    X.loss.{bin,idx}    one sequence a document: start, end, start, end, … of the tokens that are trained on, as a
                        conversation's answers are. Absent when all tokens are.
    X.meta.npy          one row a picture (META): size, format, crc32, place in the document, …
    X.manifest.json     written last: counts, and each file's size and sha256

The pairs are Megatron-Core's own indexed binaries: stock `IndexedDataset` reads them (the pictures with
`multimodal=True`), but checks nothing; everything here does. All integers are little-endian, as in the stock files.
"""

import struct
from pathlib import Path

import numpy as np

SCHEMA = 1
META = np.dtype(
    [
        ("width", "<u2"), ("height", "<u2"),  # pixels, upright
        ("format", "u1"),  # number in ingest.images.FORMATS
        ("orientation", "u1"),  # the original's EXIF value
        ("flags", "<u2"),  # 1: transcoded at ingest
        ("nbytes", "<u4"), ("crc32", "<u4"),  # of the stored bytes
        ("offset", "<u4"),  # of the image id in the document's tokens
        ("hash", "<u8"),  # BLAKE2b of the original bytes
    ]
)  # fmt: skip
HEADER = struct.Struct("<9sQBQQ")  # of an .idx: magic, version, dtype code, sequences, document entries
MAGIC = b"MMIDIDX\x00\x00"
CODES = {np.dtype("u1"): 1, np.dtype("<i4"): 4, np.dtype("<u2"): 8}  # Megatron-Core's DType
MANIFEST = "manifest.json"


def file_of(prefix: str | Path, part: str) -> Path:
    """`file_of("data/captions", "text.bin")` is data/captions.text.bin."""
    return Path(f"{prefix}.{part}")
