"""Layouts measured on the real modules, in processes that hold nothing else (see `probe.py`)."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_mm.config import RunConfig, config_to_dict
from megatron_mm.planning.memory import StageBytes

_SECONDS = 120  # a layout takes some seconds; beyond this something hangs


def measure(
    configs: Sequence[RunConfig], world_size: int, imbalance: float, gpu: bool = True
) -> list[list[StageBytes]]:
    """The stages of each layout. Layouts of one model share a process, and there is a process a core.

    Args:
        imbalance: tokens that the busiest expert-parallel rank gets, over the mean.
        gpu: as the layers run on a GPU; False: as on a CPU.
    """
    cores = len(os.sched_getaffinity(0))
    alike: dict[Any, list[int]] = {}
    for number, config in enumerate(configs):
        alike.setdefault((config.model, config.training.layers), []).append(number)
    shares = [numbers[i::cores] for numbers in alike.values() for i in range(min(cores, len(numbers)))]
    settings = {"world_size": world_size, "expert_imbalance": imbalance, "gpu": gpu}
    jobs = [{"configs": [config_to_dict(configs[n]) for n in share], **settings} for share in shares]
    found: dict[int, list[StageBytes]] = {}
    with ThreadPoolExecutor(cores) as pool:
        for share, answers in zip(shares, pool.map(_probe, jobs), strict=True):
            found.update(zip(share, answers, strict=True))
    return [found[number] for number in range(len(configs))]


def _probe(job: dict[str, Any]) -> list[list[StageBytes]]:
    # A GPU, where there is one, is left alone.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_mm.planning.probe"],
        input=json.dumps(job), capture_output=True, text=True, timeout=_SECONDS * (1 + len(job["configs"])), env=env,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"a layout could not be built:\n{done.stderr[-4000:]}")
    lines = done.stdout.splitlines()[-len(job["configs"]) :]
    return [[StageBytes.from_dict(stage) for stage in json.loads(line)] for line in lines]
