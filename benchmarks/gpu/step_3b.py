"""A training step of MM1-3B at 4096 positions: ours in bf16 and FP8, bare Megatron-Core's, transformers'.

    mix      20 sequences in MM1's proportions: 9 of captions, 9 interleaved, 2 of text, documents as long as theirs
    images   16 images of 378² in every sequence
    text     one document a sequence, no image; the competitors get the same: there packing gains nothing

Ours is the whole step of a run: encoder, connector, decoder, loss by source, clipping, AdamW with fp32 masters.
Bare Megatron-Core is GPTModel with its own wrapper, schedule and optimizer. transformers is Qwen3ForCausalLM of the
same shape in pure bf16, torch's fused AdamW on the bf16 weights (no masters: less work than ours), attention through
torch's flash kernels, its own loss. Peaks are the data sheet's, dense.
"""

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit import Case, Figures, Ratio, at_least, at_most, load, run

SEQUENCES = 8  # a step of `images` and `text`
STEPS = 6
RECIPES = ("tensorwise", "delayed", "blockwise")


def trainer(kind: str, smoke: bool, *overrides: str) -> Figures:
    from workload import MIX, recipe, train_figures

    config = recipe("mm1-3b", smoke, *overrides)
    kinds = {"mix": MIX, "images": ["images"] * SEQUENCES, "text": ["one document"] * SEQUENCES}[kind]
    if smoke:
        kinds = kinds[:: len(kinds) // 2]
    return train_figures(config, kinds, smoke, 1 if smoke else STEPS, profiled=kind != "images")


def fp8(kind: str, scaling: str, smoke: bool) -> Figures:
    from kit import has_gpu

    if not has_gpu():
        return {"skipped": "needs CUDA and Transformer Engine"}
    return trainer(kind, smoke, f"training.fp8={scaling}")


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


def text_transformers(smoke: bool) -> Figures:
    """Attention: flash_attention_2 where the package flash-attn is installed, else torch's, which takes the same kind
    of kernel for a causal mask."""
    import importlib.util

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from workload import recipe

    from megatron_mm.parallel.backend import device, on_gpu

    config = recipe("mm1-3b", smoke)
    d = config.model.decoder
    flash = on_gpu() and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    shape = Qwen3Config(
        vocab_size=d.vocab_size, hidden_size=d.hidden_size, intermediate_size=d.ffn_hidden_size, head_dim=d.head_dim,
        num_hidden_layers=d.num_layers, num_attention_heads=d.num_attention_heads, tie_word_embeddings=False,
        num_key_value_heads=d.num_query_groups, max_position_embeddings=config.data.seq_length, use_cache=False,
        attn_implementation=attention, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(device()):
        model = Qwen3ForCausalLM(shape).to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=on_gpu())
    given, documents = _text(config, smoke)

    def step() -> None:
        for batch in given:
            (model(input_ids=batch.tokens, labels=batch.tokens).loss / len(given)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _text_figures(config, _timed(step, smoke), documents) | {"attention": attention}


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
        eights = [found[f"{kind}-fp8-{r}"] for r in RECIPES if f"{kind}-fp8-{r}" in found]
        if eights and f"{kind}-bf16" in found:
            best, plain = max(f["tokens_per_s"] for f in eights), found[f"{kind}-bf16"]["tokens_per_s"]
            lines.append(at_least(f"{kind} FP8", best, "tokens/s", plain, "tokens/s in bf16", 1.35))
    text = found.get("text-bf16")
    if text and "text-transformers" in found:
        other = found["text-transformers"]["tokens_per_s"]
        lines.append(at_least("text", text["tokens_per_s"], "tokens/s", other, "tokens/s of transformers", 1.3))
    if text and "text-bare" in found:
        ours, bare = (f["seconds_per_step"]["median"] for f in (text, found["text-bare"]))
        lines.append(at_most("text", ours, "s a step", bare, "s of bare Megatron-Core", 1.05))
    return lines


CASES = [  # the most telling first
    Case("mix-bf16", mix_bf16),
    Case("text-bf16", text_bf16),
    Case("mix-fp8-tensorwise", functools.partial(fp8, "mix", "tensorwise")),
    Case("text-bare", text_bare),
    Case("text-transformers", text_transformers),
    Case("images-bf16", images_bf16),
    Case("mix-fp8-blockwise", functools.partial(fp8, "mix", "blockwise")),
    Case("mix-fp8-delayed", functools.partial(fp8, "mix", "delayed")),
    Case("text-fp8-tensorwise", functools.partial(fp8, "text", "tensorwise")),
    Case("mix-bf16-two", mix_bf16_two),
]

if __name__ == "__main__":
    run("step_3b", __doc__ or "", CASES, ratios)
