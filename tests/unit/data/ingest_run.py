"""tools/preprocess_data.py with small chunks and shards, so that little data is work for many.

python ingest_run.py CHUNK_BYTES ARGUMENT …        FILE_SIZE_LIMIT=N: files grow to N bytes, more is an error
                                                  SILENCE=N: ranks without a word for N seconds are dead
"""

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import preprocess_data

from megatron_mm.data.ingest import ranks, shards
from megatron_mm.data.ingest.formats import FORMATS
from megatron_mm.data.ingest.jsonl import JSONLines
from megatron_mm.errors import run_cli

if __name__ == "__main__":
    if "FILE_SIZE_LIMIT" in os.environ:
        if "PMI_RANK" in os.environ:
            from mpi4py import MPI  # noqa: F401  (its own files are larger)
        limit = int(os.environ["FILE_SIZE_LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    ranks.SILENCE = int(os.environ.get("SILENCE", ranks.SILENCE))
    size = int(sys.argv.pop(1))
    shards.SHARD_BYTES = size
    FORMATS["jsonl"] = JSONLines(size)
    run_cli(preprocess_data.main)
