"""A run on a GPU, exported: transformers' logits of the folder are the trained model's own. `make test-gpu`.

Not yet run on a GPU (docs/status.md).
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import megatron_mm.hf  # noqa: F401 (registers the classes)
from tests.ranks import ROOT, run_ranks
from tests.tiny import tiny_run, tool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none here")
HAS_TE = importlib.util.find_spec("transformer_engine") is not None


def exported(folder: Path, data: Path, layers: str, precision: str) -> tuple[dict[str, torch.Tensor], Path]:
    """Trained on the GPU: its logits on held-out batches, and the exported folder."""
    config = tiny_run(folder, data, training__steps=4, training__precision=precision, training__layers=layers)
    run_ranks(1, ["-m", "megatron_mm.train", "--config", str(config)], folder / "train", timeout=200)
    tool("convert_checkpoint.py", "to-hf", "--checkpoint", folder / "run", "--output", folder / "hf")
    script = str(ROOT / "tests/hf/megatron_logits.py")
    run_ranks(1, [script, str(config), str(folder / "logits.safetensors")], folder / "logits", timeout=200)
    return load_file(folder / "logits.safetensors"), folder / "hf"


def transformers_logits(folder: Path, stored: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of the same packed rows, on the CPU in fp32 or on the GPU in bf16; by source."""
    where = "cpu" if dtype is torch.float32 else "cuda"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval().to(where)
    processor = AutoProcessor.from_pretrained(folder).image_processor
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    found = {}
    for source in sorted({name.split(".")[0] for name in stored}):
        tokens, documents, images = (stored[f"{source}.{k}"] for k in ("tokens", "documents", "images"))
        same = documents.unsqueeze(1) == documents.unsqueeze(2)
        allowed = (same & torch.ones_like(same).tril()).unsqueeze(1).to(where)
        pixels = ((images.float() / 255 - mean) / std).to(where, dtype)
        has_images = {"pixel_values": pixels} if len(pixels) else {}
        with torch.no_grad():
            logits = model(input_ids=tokens.to(where), attention_mask=allowed, **has_images).logits
        found[source] = logits.float().cpu()
    return found


def test_logits_in_fp32(tmp_path: Path, data: Path) -> None:
    stored, folder = exported(tmp_path, data, "local", "fp32")
    images = 0
    for source, logits in transformers_logits(folder, stored, torch.float32).items():
        real = stored[f"{source}.documents"] >= 0
        images += len(stored[f"{source}.images"])
        torch.testing.assert_close(logits[real], stored[f"{source}.logits"][real], atol=5e-4, rtol=0)
    assert images > 2


@pytest.mark.skipif(not HAS_TE, reason="needs Transformer Engine, and it is not here")
def test_logits_in_bf16_of_fused_layers(tmp_path: Path, data: Path) -> None:
    """Ours are as near to fp32 as transformers' own in bf16."""
    stored, folder = exported(tmp_path, data, "transformer_engine", "bf16")
    exact = transformers_logits(folder, stored, torch.float32)
    theirs = transformers_logits(folder, stored, torch.bfloat16)
    for source, logits in exact.items():
        real = stored[f"{source}.documents"] >= 0
        ours = (stored[f"{source}.logits"] - logits)[real].norm() / logits[real].norm()
        bound = (theirs[source] - logits)[real].norm() / logits[real].norm()
        assert ours <= max(0.02, 2 * bound), source
