"""One rank of the optimizer's test: a few steps of the real trainer, with what every update got and gave.

    python tests/parallel/optimizer_steps.py CONFIG.yaml OUT_DIR

Rank r writes OUT_DIR/gradients-N.r.safetensors, what it holds of the reduced gradients before update N, and
OUT_DIR/weights-N.r.safetensors, its weights (in bf16 its fp32 masters) before update N and, last, after all of them;
rank 0 writes OUT_DIR/steps.json, what the trainer tells of each step.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_mm.config import load_config
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import initialize, shut_down
from megatron_mm.training.checkpoint import model_boxes, state_boxes
from megatron_mm.training.step import Trainer
from tests.parallel.one_step import SOURCES, VARIANTS, gradients, layout_of, microbatch

STEPS = ("none", "all", "some", "all")  # which sequences hold images: without any, the encoder's gradients are zero


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    pieces = list(trainer.pieces())
    if trainer.config.training.precision == "fp32":
        return {box.key: box.tensor.clone() for box in model_boxes(pieces)}
    boxes = [box for box in state_boxes(trainer, pieces) if box.name.startswith("main/")]
    return {box.key.removeprefix("main/"): box.tensor.clone() for box in boxes}


def main() -> None:
    config, out = load_config(sys.argv[1]), Path(sys.argv[2])
    topology = initialize(config, launch())
    layout = layout_of(config)
    trainer = Trainer(config, topology, layout, SOURCES)
    number, update = 0, trainer.optimizer.step

    def recorded() -> Any:
        save_file(gradients(trainer), out / f"gradients-{number}.{topology.rank}.safetensors")
        save_file(weights(trainer), out / f"weights-{number}.{topology.rank}.safetensors")
        return update()

    trainer.optimizer.step = recorded
    size, told = config.training.micro_batch_size, []
    bins = [list(range(i, i + size)) for i in range(0, config.training.global_batch_size, size)]
    for number, variant in enumerate(STEPS):
        mine = bins[topology.dp_rank :: topology.dp_size]
        batches = [microbatch(config, layout, VARIANTS[variant], b, topology) for b in mine]
        result = trainer.train_step(batches, number)
        told.append({"grad_norm": result.grad_norm, "learning_rate": result.learning_rate})
    save_file(weights(trainer), out / f"weights-{len(STEPS)}.{topology.rank}.safetensors")
    if topology.rank == 0:
        (out / "steps.json").write_text(json.dumps(told))
    shut_down()


if __name__ == "__main__":
    main()
