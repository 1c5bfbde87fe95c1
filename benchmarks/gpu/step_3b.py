"""A training step of MM1-3B at 4096 positions: ours in bf16 and FP8, bare Megatron-Core's, transformers'.

    mix      20 sequences in MM1's proportions: 9 of captions, 9 interleaved, 2 of text, documents as long as theirs
    images   16 images of 378² in every sequence
    text     one document a sequence, no image; the competitors get the same: there packing gains nothing

Ours is the whole step of a run: encoder, connector, decoder, loss by source, clipping, AdamW with fp32 masters.
Bare Megatron-Core is GPTModel with its own wrapper, schedule and optimizer. transformers is Qwen3ForCausalLM of the
same shape in pure bf16, torch's fused AdamW on the bf16 weights (no masters: less work than ours), attention by
flash-attn where it is installed, else through torch's kernels, its own loss; on images our exported model's code, which
is transformers' classes for encoder and decoder and our connector. Peaks are the data sheet's, dense.
"""

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cases import Case, Ratio, at_least, at_most, run
from kit import Figures, has_gpu, load

SEQUENCES = 8  # a step of `images` and `text`
STEPS = 5


def trainer(kind: str, smoke: bool, *overrides: str) -> Figures:
    from workload import MIX, recipe, sequences, train_figures

    config = recipe("mm1-3b", smoke, *overrides)
    by_kind = {
        "mix": MIX, "images": sequences({"images": SEQUENCES}), "text": sequences({"one document": SEQUENCES})
    }  # fmt: skip
    kinds = by_kind[kind]
    if smoke:
        kinds = kinds[:: len(kinds) // 2]
    return train_figures(config, kinds, smoke, STEPS, profiled=kind != "images")


def fp8(kind: str, scaling: str, smoke: bool, encoder: bool = False) -> Figures:
    if not has_gpu():
        return {"skipped": "needs CUDA and Transformer Engine"}
    return trainer(kind, smoke, f"training.fp8={scaling}", f"training.fp8_vision={str(encoder).lower()}")


def mix_bf16(smoke: bool) -> Figures:
    return trainer("mix", smoke)


def text_bf16(smoke: bool) -> Figures:
    return trainer("text", smoke)


def images_bf16(smoke: bool) -> Figures:
    return trainer("images", smoke)


def mix_bf16_two(smoke: bool) -> Figures:
    """Two sequences a microbatch: larger products, fewer launches, twice the activations."""
    return trainer("mix", smoke, "training.micro_batch_size=2", "training.global_batch_size=2")


def _timed(step: Any, smoke: bool) -> list[float]:
    from workload import synchronize

    seconds = []
    for number in range(2 if smoke else 2 + STEPS):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        if number >= (1 if smoke else 2):
            seconds.append(time.perf_counter() - start)
    return seconds


def _text(config: Any, smoke: bool) -> tuple[list[Any], list[int]]:
    from workload import batches

    return batches(config, ["one document"] * (2 if smoke else SEQUENCES))


def _text_figures(config: Any, seconds: list[float], documents: list[int]) -> Figures:
    """As ours on text, whose encoder does nothing there."""
    from workload import peak_gib, step_figures

    return step_figures(config, seconds, len(documents), documents, 0) | {"peak_gib": peak_gib()}


def text_bare(smoke: bool) -> Figures:
    """Megatron-Core's own loop, as its examples write it."""
    import torch
    from workload import alone, recipe

    config = recipe("mm1-3b", smoke)
    with alone(config):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer.module import Float16Module

        from megatron_mm.model.attention import attention_mask
        from megatron_mm.model.decoder import build_decoder, transformer_config
        from megatron_mm.model.kernels import uses_transformer_engine
        from megatron_mm.parallel.backend import device

        transformer = transformer_config(config)
        decoder = build_decoder(config, transformer, True, True, None).to(device())
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
                parameter.tensor_model_parallel = False
        module: Any = Float16Module(transformer, decoder) if transformer.bf16 else decoder
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        model = DistributedDataParallel(transformer, ddp, module)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-5, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True,
                bf16=transformer.bf16, params_dtype=transformer.params_dtype,
            ),
            [model],
        )  # fmt: skip
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = optimizer.scale_loss
        given, documents = _text(config, smoke)
        # Transformer Engine's attention is causal by itself.
        mask = None if uses_transformer_engine(config) else attention_mask(given[0].documents)

        def loss_of(loss_mask: Any, output: Any) -> tuple[Any, dict[str, Any]]:
            loss = (output.float() * loss_mask).sum() / loss_mask.sum()
            return loss, {"loss": loss.detach().clone()}

        def forward_step(left: Iterator[Any], model: Any) -> tuple[Any, Any]:
            batch = next(left)
            output = model(batch.tokens, batch.position_ids, mask, labels=batch.labels)
            return output, functools.partial(loss_of, batch.loss_mask)

        def step() -> None:
            model.zero_grad_buffer()
            optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=iter(given), model=[model], num_microbatches=len(given),
                seq_length=config.data.seq_length, micro_batch_size=1, forward_only=False,
            )  # fmt: skip
            optimizer.step()

        return _text_figures(config, _timed(step, smoke), documents)


def _text_shape(config: Any) -> Any:
    """Attention: flash_attention_2 where the package flash-attn is installed, else torch's, which takes the same kind
    of kernel for a causal mask."""
    import torch
    from transformers import Qwen3Config

    d = config.model.decoder
    flash = has_gpu() and importlib.util.find_spec("flash_attn") is not None
    return Qwen3Config(
        vocab_size=d.vocab_size, hidden_size=d.hidden_size, intermediate_size=d.ffn_hidden_size, head_dim=d.head_dim,
        num_hidden_layers=d.num_layers, num_attention_heads=d.num_attention_heads, tie_word_embeddings=False,
        num_key_value_heads=d.num_query_groups, max_position_embeddings=config.data.seq_length, use_cache=False,
        attn_implementation="flash_attention_2" if flash else "sdpa", dtype=torch.bfloat16,
    )  # fmt: skip


def _transformers_step(model: Any, given: list[dict[str, Any]]) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=has_gpu())

    def step() -> None:
        for batch in given:
            (model(**batch).loss / len(given)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def text_transformers(smoke: bool) -> Figures:
    import torch
    from transformers import Qwen3ForCausalLM
    from workload import recipe

    from megatron_mm.parallel.backend import device

    config = recipe("mm1-3b", smoke)
    shape = _text_shape(config)
    with torch.device(device()):
        model = Qwen3ForCausalLM(shape).to(torch.bfloat16).train()
    batches, documents = _text(config, smoke)
    step = _transformers_step(model, [{"input_ids": b.tokens, "labels": b.tokens} for b in batches])
    return _text_figures(config, _timed(step, smoke), documents) | {"attention": shape._attn_implementation}


def images_transformers(smoke: bool) -> Figures:
    """Each row is one document: to keep packed ones apart it would need a mask, which costs the fused kernels."""
    import torch
    from transformers import CLIPVisionConfig
    from workload import batches, layout_of, peak_gib, recipe, step_figures

    from megatron_mm.hf.configuration import MegatronMMConfig
    from megatron_mm.hf.modeling import MegatronMMForConditionalGeneration
    from megatron_mm.parallel.backend import device

    config = recipe("mm1-3b", smoke)
    v, c = config.model.vision, config.model.connector
    text = _text_shape(config)
    vision = CLIPVisionConfig(
        hidden_size=v.hidden_size, intermediate_size=v.ffn_hidden_size, num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_attention_heads, image_size=v.image_size, patch_size=v.patch_size,
        hidden_act="quick_gelu", dtype=torch.bfloat16,
    )  # fmt: skip
    given, _ = batches(config, ["images"] * (2 if smoke else SEQUENCES))
    shape = MegatronMMConfig(
        vision_config=vision, text_config=text, tokens_per_image=c.num_tokens,
        image_token_id=layout_of(config).image_token_id,
        connector_kind=c.kind, connector_hidden_size=c.hidden_size, connector_depth=c.depth,
        attn_implementation=text._attn_implementation, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(device()):
        model = MegatronMMForConditionalGeneration(shape).to(torch.bfloat16).train()
    rows = [
        {"input_ids": b.tokens, "pixel_values": (b.images / 127.5 - 1).bfloat16(), "labels": b.tokens} for b in given
    ]
    seconds = _timed(_transformers_step(model, rows), smoke)
    documents, images = [config.data.seq_length] * len(given), sum(b.num_images for b in given)
    figures = step_figures(config, seconds, len(given), documents, images)
    return figures | {"peak_gib": peak_gib(), "attention": text._attn_implementation}


def _floor(figures: Figures, ceilings: dict[str, Figures], fp8: bool) -> float | None:
    """Seconds that the step's products would take at the measured ceilings."""
    if "bf16" not in ceilings or (fp8 and "fp8" not in ceilings):
        return None
    fast = ceilings["fp8" if fp8 else "bf16"]["best_tflops"] * 1e12
    work = figures["flops"]
    rest = work["vision"] + work["connector"] + work["attention"]
    return float(work["decoder"] / fast + rest / (ceilings["bf16"]["best_tflops"] * 1e12))


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    lines = []
    ceilings = load(results, "ceilings")
    for name, figures in found.items():
        floor = _floor(figures, ceilings, "fp8" in name)
        if floor and "tflops" in figures:
            seconds = figures["seconds_per_step"]["median"]
            lines.append(Ratio(f"{name} floor", floor, "s at the measured ceilings", seconds, "s a step"))
    for name, share in (("mix-bf16", 0.55), ("text-bf16", 0.6)):
        if found.get(name, {}).get("mfu"):
            rate = found[name]["tflops"]
            peak = rate / found[name]["mfu"]
            lines.append(at_least(f"{name} MFU", rate, "TFLOP/s", peak, "TFLOP/s of the data sheet", share))
    for kind in ("mix", "text"):
        eights = [f for name, f in found.items() if name.startswith(f"{kind}-fp8")]
        if eights and f"{kind}-bf16" in found:
            best, plain = max(f["tokens_per_s"] for f in eights), found[f"{kind}-bf16"]["tokens_per_s"]
            lines.append(at_least(f"{kind} FP8", best, "tokens/s", plain, "tokens/s in bf16", 1.35))
    text = found.get("text-bf16")
    if text and "text-transformers" in found:
        other = found["text-transformers"]["tokens_per_s"]
        lines.append(at_least("text", text["tokens_per_s"], "tokens/s", other, "tokens/s of transformers", 1.3))
    images = found.get("images-bf16")
    if images and "images-transformers" in found:
        other = found["images-transformers"]["tokens_per_s"]
        lines.append(at_least("images", images["tokens_per_s"], "tokens/s", other, "tokens/s of transformers", 1.3))
    if text and "text-bare" in found:
        ours, bare = (f["seconds_per_step"]["median"] for f in (text, found["text-bare"]))
        lines.append(at_most("text", ours, "s a step", bare, "s of bare Megatron-Core", 1.05))
    return lines


CASES = [  # the most telling first
    Case("mix-bf16", mix_bf16),
    Case("text-bf16", text_bf16),
    Case("mix-fp8-tensorwise", functools.partial(fp8, "mix", "tensorwise")),
    Case("text-transformers", text_transformers),
    Case("text-bare", text_bare),
    Case("images-bf16", images_bf16),
    Case("mix-fp8-tensorwise-encoder-too", functools.partial(fp8, "mix", "tensorwise", encoder=True)),
    Case("text-fp8-tensorwise", functools.partial(fp8, "text", "tensorwise")),
    Case("images-transformers", images_transformers),
    Case("mix-fp8-blockwise", functools.partial(fp8, "mix", "blockwise")),
    Case("mix-fp8-delayed", functools.partial(fp8, "mix", "delayed")),
    # Alone: it takes nearly all memory.
    Case("mix-bf16-two", mix_bf16_two, environment=(("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),)),
]

if __name__ == "__main__":
    run("step_3b", __doc__ or "", CASES, ratios)
