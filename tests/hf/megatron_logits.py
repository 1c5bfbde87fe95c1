"""The trained model's logits on held-out batches, for comparison with its export.

    python tests/hf/megatron_logits.py CONFIG.yaml OUT.safetensors

One rank loads the newest checkpoint, whatever layout wrote it, and stores the first microbatch of each source:
tokens, documents, pixels and fp32 logits.
"""

import sys

import torch
from safetensors.torch import save_file

from megatron_mm.config import load_config
from megatron_mm.data.loader import TrainingData
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import initialize, shut_down
from megatron_mm.training.checkpoint import Checkpointer
from megatron_mm.training.step import Trainer


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[3:])
    topology = initialize(config, launch())
    data = TrainingData.open(config)
    trainer = Trainer(config, topology, data.layout, len(data.source_names))
    assert Checkpointer(config, trainer, data.tokenizer.path).load_latest() > 0
    stored = {}
    (model,) = trainer.chunks
    model.eval()
    for source in range(len(data.source_names)):
        batch = next(data.validation_loader(source, 0, 1, (0, 1)))
        with torch.no_grad():
            logits = model(batch, data.layout, return_logits=True)  # [b, s, vocab]
        for name in ("tokens", "documents", "images", "loss_mask"):
            stored[f"{source}.{name}"] = getattr(batch, name).contiguous()
        stored[f"{source}.logits"] = logits.float().contiguous()
    save_file(stored, sys.argv[2])
    shut_down()


if __name__ == "__main__":
    main()
