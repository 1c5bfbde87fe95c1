"""What this GPU reaches when nothing stands in its way: large matrix products in bf16 and FP8, and copies.

Random numbers, since zeros run faster; three sets of inputs in turn, so that no cache holds them. A copy counts the
bytes read and the bytes written.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case, Ratio, run
from kit import Figures, has_gpu, seconds_each, spread

# (m, k, n): a large square, and the decoder's own in a sequence of 4096: attention's and the FFN's.
SHAPES = {"square": (8192, 8192, 8192), "attention": (4096, 3072, 9216), "ffn": (4096, 3072, 16384)}


def _rates(smoke: bool, inputs: Callable[[int, int, int], Any], product: Callable[..., Any]) -> Figures:
    found = {}
    for name, shape in SHAPES.items():
        m, k, n = (64, 64, 64) if smoke else shape
        sets = [inputs(m, k, n) for _ in range(3)]
        turn = iter(range(1 << 30))
        seconds = seconds_each(lambda sets=sets, turn=turn: product(*sets[next(turn) % 3]), 3 if smoke else 40)  # type: ignore[misc]
        found[name] = {"tflops": round(2e-12 * m * k * n / spread(seconds)["median"], 1)} | spread(seconds)
    return found | {"best_tflops": max(f["tflops"] for f in found.values())}


def _bf16(m: int, k: int, n: int) -> Any:
    import torch

    where = "cuda" if has_gpu() else "cpu"
    return [torch.randn(shape, device=where).bfloat16() for shape in ((m, k), (k, n))]


def bf16(smoke: bool) -> Figures:
    import torch

    return _rates(smoke, _bf16, torch.mm)


def fp8(smoke: bool) -> Figures:
    """e4m3 with one scale a tensor, into bf16: what cuBLAS does under FP8 training, without the casts."""
    if not has_gpu():
        return {"skipped": "needs CUDA"}
    import torch

    one = torch.ones((), device="cuda")

    def inputs(m: int, k: int, n: int) -> Any:
        a, b = _bf16(m, k, n)
        return a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()

    def product(a: Any, b: Any) -> Any:
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return _rates(smoke, inputs, product)


def copy(smoke: bool) -> Figures:
    import torch

    where = "cuda" if has_gpu() else "cpu"
    size = 1 << (20 if smoke else 32)  # bytes
    pairs = [[torch.randint(0, 255, (size,), dtype=torch.uint8, device=where) for _ in range(2)] for _ in range(2)]
    turn = iter(range(1 << 30))

    def once() -> None:
        source, target = pairs[next(turn) % 2]
        target.copy_(source)

    seconds = spread(seconds_each(once, 3 if smoke else 30))
    return {"bytes_per_s": 2 * size / seconds["median"]} | seconds


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    if not {"bf16", "fp8"} <= found.keys():
        return []
    ours, other = found["fp8"]["best_tflops"], found["bf16"]["best_tflops"]
    return [Ratio("ceilings", ours, "TFLOP/s of an FP8 product", other, "TFLOP/s of one in bf16")]


CASES = [Case("bf16", bf16, 180), Case("copy", copy, 180), Case("fp8", fp8, 180)]

if __name__ == "__main__":
    run("ceilings", __doc__ or "", CASES, ratios)
