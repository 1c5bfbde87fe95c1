"""One rank of a test of `checkpoint.init_from`: what a new run is before its first step, as its checkpoint at step 0.

    python tests/parallel/start_from.py CONFIG.yaml [--drawn-first] [a.b=value …]

All weights are drawn before the optimizer is built (--drawn-first), or after it those that no checkpoint holds.
Says what `load_weights` reports and, where the optimizer holds the parameters themselves (fp32, not distributed),
the learning rate of each at step 0: a line `rates JSON`.
"""

import json
import sys
from pathlib import Path

from megatron_mm.config import load_config
from megatron_mm.errors import UserError
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import initialize, shut_down
from megatron_mm.training.checkpoint import Checkpointer
from megatron_mm.training.initial_weights import load_weights
from megatron_mm.training.optimizer import set_learning_rate
from megatron_mm.training.step import Trainer
from tests.parallel.one_step import SOURCES, layout_of


def main() -> int:
    drawn_first = "--drawn-first" in sys.argv
    config = load_config(sys.argv[1], [a for a in sys.argv[2:] if not a.startswith("--")])
    topology = initialize(config, launch())
    trainer = Trainer(config, topology, layout_of(config), SOURCES, drawn_first)
    if config.checkpoint.init_from:
        print(load_weights(trainer, config.checkpoint.init_from).report())
    if not trainer.has_weights:
        trainer.draw_weights()
    set_learning_rate(trainer.optimizer, config, 0)
    names = {id(piece.parameter): piece.name for piece in trainer.pieces()}
    groups = trainer.optimizer.param_groups
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"] if id(p) in names}
    print("rates", json.dumps(rates))
    checkpointer = Checkpointer(config, trainer, Path(config.data.tokenizer))
    checkpointer.save(0)
    checkpointer.wait()
    shut_down()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
