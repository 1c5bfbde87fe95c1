"""One rank: the encoder's features and gradients in several forms, to be compared.

    python tests/parallel/encoder_forms.py CONFIG.yaml OUT_DIR FORM...

FORM: `plain` (the images are a batch), a number N (they lie in one row of a multiple of N positions) or `own` (as the
configuration says). For each number of images and each form, OUT_DIR/IMAGES-FORM.safetensors. The local layers are told
the borders by a mask, Transformer Engine's by themselves.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_mm.config import load_config
from megatron_mm.model.build import build_model
from megatron_mm.model.kernels import uses_transformer_engine
from megatron_mm.parallel.backend import device
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import initialize, shut_down
from tests.parallel.one_step import borders_as_full_mask

IMAGES = (1, 2, 5)  # none do not reach the encoder: tests/parallel/test_layouts.py


def main() -> None:
    config, out, forms = load_config(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    initialize(config, launch())
    (model,) = build_model(config)
    encoder = model.vision
    assert encoder is not None
    own = encoder.tile
    if not uses_transformer_engine(config):
        encoder.decoder.register_forward_pre_hook(borders_as_full_mask, with_kwargs=True)
    v = config.model.vision
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (max(IMAGES), 3, v.image_size, v.image_size), generator=generator)
    pixels = pixels.to(torch.uint8).to(device())
    weights = torch.randn(max(IMAGES), v.grid**2, v.hidden_size, generator=generator).to(device())
    for images in IMAGES:
        for form in forms:
            encoder.tile = {"plain": None, "own": own}[form] if form in ("plain", "own") else int(form)
            encoder.zero_grad(set_to_none=True)
            features = encoder(pixels[:images])
            (features.float() * weights[:images]).sum().backward()
            found = {f"gradient of {n}": p.grad for n, p in encoder.named_parameters() if p.grad is not None}
            found["features"] = features.detach()
            save_file({n: t.contiguous().cpu() for n, t in found.items()}, out / f"{images}-{form}.safetensors")
    shut_down()


if __name__ == "__main__":
    main()
