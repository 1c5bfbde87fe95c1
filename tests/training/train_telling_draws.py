"""The training command, telling what is drawn: a line `drawn: NAME` a matrix, and one for the connector.

python tests/training/train_telling_draws.py --config FILE [a.b=value …]
"""

import runpy
from typing import Any

from torch import Tensor

from megatron_mm.model import initialization

normal, build_connector = initialization.normal, initialization.build_connector


def normal_told(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    print("drawn:", name, flush=True)
    return normal(seed, name, shape, std)


def connector_told(*arguments: Any) -> Any:
    print("drawn: connector", flush=True)
    return build_connector(*arguments)


if __name__ == "__main__":
    initialization.normal, initialization.build_connector = normal_told, connector_told
    runpy.run_module("megatron_mm.train", run_name="__main__")
