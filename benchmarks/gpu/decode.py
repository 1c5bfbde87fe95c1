"""JPEGs of 640×480, 66 KB, to 378²: images a second on the GPU, on a CPU core, on all of them, and what a step needs.

On the GPU through the loader's own DeviceDecoder, 16 images a call, as a microbatch has them, and 64. On the CPU the
backend `cpu`, a process a core. What the step needs is what gpu-step_3b.json says that it takes.
"""

import functools
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from cases import Case, Ratio, at_least, run
from kit import Figures, load, spread

SIZE, PICTURES = 378, 64


def _encoded(smoke: bool) -> list[bytes]:
    import made

    return [made.jpeg(seed) for seed in range(2 if smoke else PICTURES)]


def _rate(call: Any, images: int, seconds: float) -> Figures:
    """Of calls over that many seconds, after some unmeasured."""
    for _ in range(3):
        call()
    rates = []
    for _ in range(5):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 5:
            call()
            count += images
        rates.append(count / (time.perf_counter() - start))
    return {"images_per_s": round(spread(rates)["median"], 1), "spread": spread(rates)["spread"], "images": images}


def on_device(images: int, smoke: bool) -> Figures:
    import torch

    from megatron_mm.data.decode import DaliBackend, Decoder, EncodedImage
    from megatron_mm.data.decode.device import DeviceDecoder
    from megatron_mm.parallel.backend import device

    encoded = _encoded(smoke)
    decoder = DeviceDecoder(Decoder(DaliBackend(10**7, device()), SIZE))
    nothing = torch.empty((0, 3, SIZE, SIZE), dtype=torch.uint8)
    batch = [EncodedImage(encoded[i % len(encoded)]) for i in range(2 if smoke else images)]
    return _rate(lambda: decoder(range(len(batch)), batch, nothing), len(batch), 0.2 if smoke else 6)


def _one_core(encoded: list[bytes], seconds: float) -> Figures:
    import torch

    from megatron_mm.data.decode import CpuBackend, Decoder, EncodedImage

    torch.set_num_threads(1)
    decoder = Decoder(CpuBackend(10**7), SIZE)
    batch = [EncodedImage(data) for data in encoded[:16]]
    return _rate(lambda: decoder(batch), len(batch), seconds)


def cpu_core(smoke: bool) -> Figures:
    return _one_core(_encoded(smoke), 0.2 if smoke else 5)


def cpu_all_cores(smoke: bool) -> Figures:
    cores = 2 if smoke else len(os.sched_getaffinity(0))
    encoded = _encoded(smoke)
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        found = pool.starmap(_one_core, [(encoded, 0.2 if smoke else 8)] * cores)
    return {"images_per_s": round(sum(f["images_per_s"] for f in found), 1), "cores": cores}


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    lines = []
    ours = max((found[n]["images_per_s"] for n in ("gpu-16", "gpu-64") if n in found), default=None)
    step = load(results, "step_3b")
    fastest = max(
        (f["images_per_s"] for n, f in step.items() if n.startswith("mix") and "images_per_s" in f), default=0
    )
    if ours and fastest:
        lines.append(at_least("decode", ours, "images/s on the GPU", fastest, "images/s that the fastest mix takes", 3))
    for name, what in (("cpu-core", "on a CPU core"), ("cpu-all-cores", "on all CPU cores")):
        if ours and name in found:
            other = found[name]["images_per_s"]
            lines.append(Ratio("decode", ours, "images/s on the GPU", other, f"images/s {what}"))
    return lines


CASES = [
    Case("gpu-16", functools.partial(on_device, 16), 180),
    Case("gpu-64", functools.partial(on_device, 64), 180),
    Case("cpu-core", cpu_core, 180),
    Case("cpu-all-cores", cpu_all_cores, 180),
]

if __name__ == "__main__":
    run("decode", __doc__ or "", CASES, ratios)
