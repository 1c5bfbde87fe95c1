"""One rank of a checkpoint test: resume from RUN_DIR if it holds a checkpoint, train to `training.steps`, save.

    python tests/parallel/some_steps.py CONFIG.yaml [a.b=value …]

Batches are synthetic and depend on the step alone. With `training.steps` equal to the checkpoint's step it only loads
and saves again: under another run_dir and layout that is a conversion.
"""

import os
import sys
from pathlib import Path

from megatron_mm.config import load_config
from megatron_mm.errors import UserError
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import initialize, shut_down
from megatron_mm.training.checkpoint import Checkpointer
from megatron_mm.training.step import Trainer
from tests.parallel.one_step import SOURCES, layout_of, microbatch


def main() -> int:
    arguments = [a for a in sys.argv[2:] if not a.startswith("--")]
    config = load_config(sys.argv[1], arguments)
    topology = initialize(config, launch())
    layout = layout_of(config)
    trainer = Trainer(config, topology, layout, SOURCES, draw_weights=False)
    checkpointer = Checkpointer(config, trainer, Path(config.data.tokenizer))
    done = checkpointer.load_latest()
    if not trainer.has_weights:
        trainer.draw_weights()
    print(f"resumed after step {done}", flush=True)
    size, total = config.training.micro_batch_size, config.training.global_batch_size
    save_to = next((a.removeprefix("--save-to=") for a in sys.argv if a.startswith("--save-to=")), None)
    while done < config.training.steps:
        counts = [(n * 7 + done) % 3 for n in range(64)]
        first = done * total % 32
        bins = [list(range(first + i, first + i + size)) for i in range(0, total, size)]
        mine = bins[topology.dp_rank :: topology.dp_size]
        result = trainer.train_step([microbatch(config, layout, counts, b, topology) for b in mine], done)
        done += 1
        print(f"step {done} loss {result.loss:.9f} grad {result.grad_norm:.9f}", flush=True)
        checkpointer.poll()
        if done % config.checkpoint.interval == 0:
            checkpointer.save(done)
    if save_to:
        checkpointer.root = Path(save_to)
        checkpointer.save(done)
    checkpointer.wait()
    shut_down()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", flush=True)
        os._exit(2)  # as the training command does: gloo's threads may outlive an error
