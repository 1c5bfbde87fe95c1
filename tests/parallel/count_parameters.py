"""Parameters of the built modules on one rank: `python count_parameters.py CONFIG.yaml …` prints JSON."""

import json
import sys

from megatron_mm.config import load_config
from megatron_mm.model.build import build_model
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import initialize, shut_down


def main() -> None:
    counts = []
    configs = [load_config(path) for path in sys.argv[1:]]
    initialize(configs[0], launch())
    for config in configs:
        (model,) = build_model(config)
        count = dict.fromkeys(("vision", "connector", "embedding", "dense", "experts"), 0)
        for name, parameter in model.named_parameters():
            part = name.split(".")[0]
            if part == "language_model":
                part = "experts" if ".experts." in name else "dense"
                if ".embedding." in name or ".output_layer." in name:
                    part = "embedding"
            count[part] += parameter.numel()
        counts.append(count)
    print(json.dumps(counts))
    shut_down()


if __name__ == "__main__":
    main()
