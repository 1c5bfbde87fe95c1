"""What each lever does to a step of MM1-3B, alone and together: tokens a second beside the step as it is.

    text        8 sequences of one document, in place of 8 of the mix (4 of captions, 3 interleaved, 1 of text)
    fp8         the decoder in FP8, tensorwise;  encoder: the encoder too
    gradients   Transformer Engine's backward products add to the fp32 gradients themselves (fuse_wgrad_accumulation),
                instead of writing bf16 ones that are then added
    loss        Transformer Engine's cross entropy in place of Megatron-Core's fused one (Megatron-Core's newest release
                warns of its stability: compare the losses)
    two         two sequences a microbatch: larger products, twice the activations
    mlp         what the decoder's FFNs hold is computed again in the backward pass: room for `two`
    connector   the connector compiled by torch
    flash       attention by the package flash-attn instead of cuDNN

A case is names joined by +. LEVERS="fp8+two text+loss" in the environment adds cases.
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

from cases import Case, Ratio, run
from kit import Figures, has_gpu

LEVERS = ("text", "fp8", "encoder", "gradients", "loss", "two", "mlp", "connector", "flash")
OVERRIDES = {
    "fp8": ["training.fp8=tensorwise"],
    "encoder": ["training.fp8_vision=true"],
    "two": ["training.micro_batch_size=2", "training.global_batch_size=2"],
}
# Of Megatron-Core's TransformerConfig, after it was built.
FIELDS: dict[str, dict[str, Any]] = {
    "loss": {"cross_entropy_fusion_impl": "te"},
}
NEEDS_TE = {"fp8", "encoder", "gradients", "loss", "flash"}


def measured(names: tuple[str, ...], smoke: bool) -> Figures:
    if not has_gpu() and NEEDS_TE & set(names):
        return {"skipped": "needs CUDA and Transformer Engine"}
    if "flash" in names and importlib.util.find_spec("flash_attn") is None:
        return {"skipped": "needs the package flash-attn"}
    from workload import recipe, sequences, train_figures, with_fields

    kinds = sequences({"caption": 4, "interleaved": 3, "text": 1})
    if "text" in names:
        kinds = sequences({"one document": 8})
    config = recipe("mm1-3b", smoke, *(o for name in names for o in OVERRIDES.get(name, [])))
    fields = {k: v for name in names for k, v in FIELDS.get(name, {}).items()}
    if "flash" in names:
        from megatron_mm.parallel.backend import import_megatron

        import_megatron()
        from megatron.core.transformer.enums import AttnBackend

        fields["attention_backend"] = AttnBackend.flash
    if smoke:
        kinds = kinds[3:5]
    with with_fields(fields):
        return train_figures(config, kinds, smoke, 6, prepare=functools.partial(_prepare, names))


def _prepare(names: tuple[str, ...], trainer: Any) -> None:
    for chunk in trainer.chunks:
        if "connector" in names:
            chunk.connector.compile(dynamic=True)
        if "gradients" in names:
            fuse_gradients(chunk)
        if "mlp" in names:
            # Not by Megatron-Core's own switch, which would take the encoder too: a bias, which its FFN hands on
            # unadded, comes out of the recomputation as a result of it, and the backward pass never ends.
            for layer in chunk.language_model.decoder.layers:
                layer.recompute_mlp = True


def fuse_gradients(model: Any) -> int:
    """Tell every layer of Transformer Engine's, after it was built; how many they are. (The output layer is not one: by
    Megatron-Core's own switch, `gradient_accumulation_fusion`, it would ask for apex.)"""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    layers = [m for m in model.modules() if isinstance(m, TransformerEngineBaseModule)]
    layers = [m for m in layers if hasattr(m, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True
    return len(layers)


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    lines = []
    for name, figures in found.items():
        levers = name.split("+")
        base = "+".join(x for x in levers if x in ("text", "fp8")) or "none"
        if base in found and base != name:
            plain = found[base]["tokens_per_s"]
            lines.append(Ratio(f"lever {name}", figures["tokens_per_s"], "tokens/s", plain, f"tokens/s of {base}"))
    return lines


def _case(name: str) -> Case:
    names = tuple(x for x in name.split("+") if x != "none")
    unknown = set(names) - set(LEVERS)
    if unknown:
        raise SystemExit(f"error: no such lever: {' '.join(sorted(unknown))}\n  allowed: {' '.join(LEVERS)}")
    # Transformer Engine reads the choice of attention once; two sequences leave little room for holes in memory.
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if {"two", "flash"} & set(names) else {}
    return Case(name, functools.partial(measured, names), environment=tuple(settings.items()))


CASES = [
    _case(name)
    for name in [
        "none", "gradients", "gradients+loss", "fp8", "fp8+gradients+loss", "text", "text+gradients+loss", "connector",
        "fp8+encoder", "gradients+loss+two", "two+mlp", "fp8+gradients+loss+two", "flash",
        *os.environ.get("LEVERS", "").split(),
    ]
]  # fmt: skip

if __name__ == "__main__":
    run("levers", __doc__ or "", CASES, ratios)
