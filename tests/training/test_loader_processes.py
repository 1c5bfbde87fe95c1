"""A training process that ends, in whatever way, takes its decoding workers with it, and is not held up by them."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.ranks import rank_environment
from tests.tiny import tiny_run

SCRIPT = """
import atexit, gc, multiprocessing.util, os, sys

atexit.register(gc.collect)  # runs between torch's own handler, which comes later, and multiprocessing's
from megatron_mm.config import load_config
from megatron_mm.data.loader import TrainingData

if __name__ == "__main__":
    data = TrainingData.open(load_config(sys.argv[1]))
    if sys.argv[3] == "device":  # played by a CPU
        from megatron_mm.data.decode.device import DeviceDecoder

        data.device_decoder = DeviceDecoder(data.decoder("dali"))
    batches = data.train_loader(0, 0, 1, (0, 1))
    next(batches)
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "kill -9":
        os.kill(os.getpid(), 9)
    if sys.argv[2] == "error":
        raise ValueError("while the batches are still held")
    if sys.argv[2] == "end, collected late":
        gc.disable()
        holder = {"batches": batches}
        holder["itself"] = holder
        del batches, holder
"""


def is_alive(pid: int) -> bool:
    """One that has ended may wait a while for whoever is its parent by now."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("how", "code", "decoder"),
    [
        ("kill -9", -9, "workers"),
        ("error", 1, "workers"),
        ("end", 0, "workers"),
        ("end, collected late", 0, "workers"),
        ("kill -9", -9, "device"),
        ("end, collected late", 0, "device"),
    ],
)
def test_workers_end_with_the_training_process(data: Path, tmp_path: Path, how: str, code: int, decoder: str) -> None:
    backend = "dali" if decoder == "device" else "cpu"
    config = tiny_run(tmp_path, data, data__num_workers=2, data__decode_backend=backend)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with (tmp_path / "out").open("w") as out:
        # Not a pipe: workers that outlive their parent would hold it open, and this test with it.
        command = [sys.executable, str(script), str(config), how, decoder]
        done = subprocess.run(command, env=rank_environment(), stdout=out, stderr=out, timeout=180)
    text = (tmp_path / "out").read_text()
    assert done.returncode == code, text
    workers = [int(pid) for pid in text.splitlines()[0].split()]
    assert len(workers) == 2
    end = time.monotonic() + 60
    while any(map(is_alive, workers)):
        assert time.monotonic() < end, "orphans"
        time.sleep(0.1)
