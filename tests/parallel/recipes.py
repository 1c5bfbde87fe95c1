"""The tiny model of the parallel tests, and its configuration as a file."""

from pathlib import Path
from typing import Any

import yaml

MODEL: dict[str, Any] = {
    "vision": {
        "num_layers": 2, "hidden_size": 48, "num_attention_heads": 3,
        "ffn_hidden_size": 96, "patch_size": 8, "image_size": 40,
    },
    "connector": {"num_tokens": 4, "hidden_size": 32, "depth": 1},
    "decoder": {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 8,
        "num_query_groups": 2, "ffn_hidden_size": 128, "vocab_size": 128,
    },
}  # fmt: skip
# To be cut where 3 heads in the encoder and 2 groups in the decoder cannot.
MORE_HEADS = {"vision": {"num_attention_heads": 4}, "decoder": {"num_query_groups": 4}}
MOE = {"num_experts": 4, "topk": 2, "layer_freq": 2}


def write_config(
    path: Path,
    run_dir: Path,
    parallel: dict[str, Any],
    moe: bool = False,
    vision: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **training: Any,
) -> Path:
    """`training.*` fields by name; batches are 8 sequences of 48 positions in microbatches of 2."""
    tokenizer = path.with_name("tokenizer.model")
    tokenizer.write_bytes(b"not read by these tests")
    config = {
        "run_dir": str(run_dir),
        "model": {
            **MODEL,
            "vision": {**MODEL["vision"], **(vision or {})},
            "decoder": {**MODEL["decoder"], "moe": MOE if moe else None, **(decoder or {})},
        },
        "parallel": parallel,
        "data": {"tokenizer": str(tokenizer), "sources": [{"path": "none", "weight": 1}], "seq_length": 48},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2, **(optimizer or {})},
        "training": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", **training},
    }
    path.write_text(yaml.safe_dump(config))
    return path
