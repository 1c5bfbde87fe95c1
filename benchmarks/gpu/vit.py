"""MM1's encoder alone, ViT-H/14 at 378 px: forward and backward, images a second and share of the peak.

By the images of a call (16 are a full sequence's; 64 would be four sequences' together), Transformer Engine's layers in
bf16 and FP8 and the local ones, the connector alone in several ways, and transformers' CLIP encoder of the same shape
with torch's fused attention.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case, Ratio, at_least, run
from kit import Figures, has_gpu, seconds_each, spread


def _figures(config: Any, images: int, connector: bool, seconds: list[float]) -> Figures:
    from workload import nominal_peak, peak_gib

    from megatron_mm.model.sizes import image_flops

    each = spread(seconds)
    vision, rest = image_flops(config.model)
    rate = 3 * images * (rest if connector else vision) / each["median"]
    peak = nominal_peak()
    return {
        "images": images, "images_per_s": round(images / each["median"], 1), "seconds": each,
        "tflops": round(rate / 1e12, 4), "mfu": peak and round(rate / peak, 4), "peak_gib": peak_gib(),
    }  # fmt: skip


def _backward(function: Callable[[], Any]) -> Callable[[], None]:
    """A step of training without the update: gradients are dropped."""

    def step() -> None:
        output = function()
        output.backward(output.detach())

    return step


def ours(layers: str, images: int, smoke: bool, scaling: str | None = None) -> Figures:
    if scaling and not has_gpu():
        return {"skipped": "needs CUDA and Transformer Engine"}
    import torch
    from workload import alone, recipe

    if smoke:
        images = 2
    overrides = [f"training.layers={layers if has_gpu() else 'local'}"]
    if scaling:
        overrides += [f"training.fp8={scaling}", "training.fp8_vision=true"]
    config = recipe("mm1-3b", smoke, *overrides)
    with alone(config):
        from megatron_mm.model.decoder import transformer_config
        from megatron_mm.model.kernels import check_kernels, uses_transformer_engine, vision_tile
        from megatron_mm.model.vision import VisionEncoder
        from megatron_mm.parallel.backend import device

        check_kernels(config)
        v = config.model.vision
        encoder = VisionEncoder(
            v, transformer_config(config), False, uses_transformer_engine(config), vision_tile(config)
        ).to(device())
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
        pixels = torch.randint(0, 256, (images, 3, v.image_size, v.image_size), dtype=torch.uint8).to(device())
        seconds = seconds_each(_backward(lambda: encoder(pixels)), 2 if smoke else 15, 1 if smoke else 4)
    return _figures(config, images, False, seconds)


def connector(way: str, smoke: bool) -> Figures:
    import torch
    from workload import recipe

    from megatron_mm.model.connector import build_connector
    from megatron_mm.parallel.backend import device

    images = 2 if smoke else 16
    config = recipe("mm1-3b", smoke)
    v = config.model.vision
    kind = torch.bfloat16 if has_gpu() else torch.float32
    module = build_connector(config.model.connector, v.hidden_size, v.grid, config.model.decoder.hidden_size)
    module = module.to(device(), kind)
    if way == "channels-last":
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif way == "compiled":
        module.compile()
    features = torch.randn(images, v.grid**2, v.hidden_size, device=device(), dtype=kind).requires_grad_()
    seconds = seconds_each(_backward(lambda: module(features)), 2 if smoke else 15, 1 if smoke else 4)
    return _figures(config, images, True, seconds)


def transformers(smoke: bool) -> Figures:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from workload import recipe

    from megatron_mm.parallel.backend import device

    images = 2 if smoke else 16
    config = recipe("mm1-3b", smoke)
    v = config.model.vision
    kind = torch.bfloat16 if has_gpu() else torch.float32
    shape = CLIPVisionConfig(
        hidden_size=v.hidden_size, intermediate_size=v.ffn_hidden_size, num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_attention_heads, image_size=v.image_size, patch_size=v.patch_size,
        hidden_act="quick_gelu", attn_implementation="sdpa", dtype=kind,
    )  # fmt: skip
    with torch.device(device()):
        model = CLIPVisionModel(shape).to(kind).train()
        pixels = torch.randn(images, 3, v.image_size, v.image_size, dtype=kind)
    seconds = seconds_each(
        _backward(lambda: model(pixel_values=pixels).last_hidden_state), 2 if smoke else 15, 1 if smoke else 4
    )
    return _figures(config, images, False, seconds)


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    lines = []
    if {"te-16", "transformers-16"} <= found.keys():
        mine, other = (found[n]["images_per_s"] for n in ("te-16", "transformers-16"))
        lines.append(at_least("encoder", mine, "images/s", other, "images/s of transformers", 1.0))
    for name, base in (
        ("te-64", "te-16"), ("te-16-fp8", "te-16"), ("local-16", "te-16"),
        ("connector-16-compiled", "connector-16"), ("connector-16-channels-last", "connector-16"),
    ):  # fmt: skip
        if {name, base} <= found.keys():
            ours, plain = (found[n]["images_per_s"] for n in (name, base))
            lines.append(Ratio(f"encoder, {name}", ours, "images/s", plain, f"images/s of {base}"))
    return lines


CASES = [
    Case("te-16", functools.partial(ours, "transformer_engine", 16)),
    Case("transformers-16", transformers),
    Case("te-64", functools.partial(ours, "transformer_engine", 64)),
    Case("te-16-fp8", functools.partial(ours, "transformer_engine", 16, scaling="tensorwise")),
    Case("connector-16", functools.partial(connector, "as it is")),
    Case("connector-16-compiled", functools.partial(connector, "compiled")),
    Case("connector-16-channels-last", functools.partial(connector, "channels-last")),
    Case("te-8", functools.partial(ours, "transformer_engine", 8)),
    Case("te-32", functools.partial(ours, "transformer_engine", 32)),
    Case("local-16", functools.partial(ours, "local", 16)),
]

if __name__ == "__main__":
    run("vit", __doc__ or "", CASES, ratios)
