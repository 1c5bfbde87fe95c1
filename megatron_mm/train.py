"""The training command: `python -m megatron_mm.train --config FILE [a.b=value …]`.

Started alone it is a run of one rank; under torchrun, srun or mpiexec each process becomes a rank of one run.
"""

import argparse
import os
import sys

from megatron_mm.config.nearest import load_for
from megatron_mm.errors import UserError
from megatron_mm.parallel.launch import launch
from megatron_mm.training.resilience import StopSignal


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_mm.train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a run as YAML; see docs/ and examples/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="fields of the config to change")
    arguments = parser.parse_args()
    rank, everywhere = 0, False
    try:
        world = launch()
        # Before anything heavy is imported: a wrong field is told within a second, and all ranks see the same one.
        rank, everywhere = world.rank, True
        config = load_for(arguments.config, arguments.overrides, world.world_size)
        everywhere = False
        # From here on a request to stop is kept until a step has ended, the seconds of importing included.
        stop = StopSignal(config.run_dir, world.rank)
        from megatron_mm.training.loop import train

        train(config, world, stop)
    except UserError as error:
        if everywhere or error.everywhere:
            if rank == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Library threads (gloo, DataLoader) may outlive an error; nothing of ours is left to do.
    os._exit(code) if code else sys.exit(0)
