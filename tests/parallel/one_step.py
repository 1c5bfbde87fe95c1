"""One rank of a layout test: loss and gradients of one step on synthetic batches, written to safetensors.

    python tests/parallel/one_step.py CONFIG.yaml OUT_DIR [--packed]

--packed runs the form that Transformer Engine's attention takes (rows end to end, told the documents' borders; in FP8
the encoder's images too) through the local layers: a mask stands for the borders.

For each variant (images on all, on some, on no ranks) rank r writes OUT_DIR/VARIANT.r.safetensors, with this rank's
boxes of the gradients keyed NAME@OFFSET, and rank 0 writes OUT_DIR/VARIANT.json with the loss and the gradient norm.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_mm.config import RunConfig, SequenceLayout, load_config
from megatron_mm.data.batch import Microbatch, share_of
from megatron_mm.model.attention import attention_mask
from megatron_mm.model.context_parallel import ContextParallelAttention
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import Topology, initialize, shut_down
from megatron_mm.training.checkpoint import flat_range_boxes
from megatron_mm.training.optimizer import state_parts
from megatron_mm.training.step import Trainer

# Images of each of the 8 sequences, in order; a microbatch is 2 sequences. Under tensor parallelism an odd number
# leaves unequal shares; "some" leaves the second data-parallel rank, and one microbatch of the first, without any.
VARIANTS = {"all": [2, 1, 1, 2, 3, 0, 1, 1], "some": [1, 2, 0, 0, 0, 0, 0, 0], "none": [0] * 8}
SOURCES = 3


def layout_of(config: RunConfig) -> SequenceLayout:
    return SequenceLayout(
        seq_length=config.data.seq_length, max_images=4, tokens_per_image=config.model.connector.num_tokens,
        image_size=config.model.vision.image_size, image_token_id=4, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip


def padding_of(number: int) -> int:
    return number % 8 * 3


def sequence(config: RunConfig, layout: SequenceLayout, number: int, images: int) -> dict[str, torch.Tensor]:
    """Sequence `number` of the global batch: two packed documents and up to 44 % padding, images among random words."""
    generator = torch.Generator().manual_seed(100 + number)
    s, m = layout.seq_length, layout.tokens_per_image
    tokens = torch.randint(5, config.model.decoder.vocab_size, (s + 1,), generator=generator)
    for i in range(images):
        tokens[2 + i * (m + 3) : 2 + i * (m + 3) + m] = layout.image_token_id
    cut, end = s // 4 + number % 8, s - padding_of(number)
    documents = torch.full((s,), -1, dtype=torch.int32)
    documents[:cut], documents[cut:end] = 0, 1
    mask = (tokens[1:] != layout.image_token_id) & (documents >= 0)
    mask[cut - 1] = False
    pixels = torch.randint(0, 256, (images, 3, layout.image_size, layout.image_size), generator=generator)
    return {
        "tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask.float(), "documents": documents,
        "images": pixels.to(torch.uint8),
    }  # fmt: skip


def microbatch(
    config: RunConfig, layout: SequenceLayout, counts: list[int], numbers: list[int], topology: Topology
) -> Microbatch:
    rows = [sequence(config, layout, n, counts[n]) for n in numbers]
    stacked = {k: torch.stack([r[k] for r in rows]) for k in ("tokens", "labels", "loss_mask", "documents")}
    pixels = torch.cat([r["images"] for r in rows])
    mine = pixels[share_of(len(pixels), *(topology.image_share or (0, 1)))]
    return Microbatch(
        **stacked,
        position_ids=torch.arange(layout.seq_length).expand(len(rows), -1),
        source_ids=torch.tensor([n % SOURCES for n in numbers]),
        sample_ids=torch.tensor(numbers),
        images=mine if topology.first_stage else pixels[:0],
        num_images=len(pixels),
    )


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What this rank holds of the reduced gradients: its shard under the distributed optimizer, else all."""
    by_parameter: dict[int, list] = {}
    for piece in trainer.pieces():
        by_parameter.setdefault(id(piece.parameter), []).append(piece)
    found = {}
    for part in state_parts(trainer.optimizer):
        for piece in by_parameter[id(part.parameter)]:
            start, end = max(part.start, piece.start), min(part.end, piece.start + piece.numel)
            flat = part.parameter.main_grad.view(-1)
            for at, offset, shape in flat_range_boxes(start - piece.start, end - piece.start, piece.shape):
                place = [a + b for a, b in zip(piece.offset, offset, strict=True)]
                box = flat[piece.start + at : piece.start + at + torch.Size(shape).numel()].view(shape)
                found[f"{piece.name}@{','.join(map(str, place))}"] = box.clone()
    return found


def borders_as_mask(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    starts = kwargs.pop("packed_seq_params").cu_seqlens_q
    numbers = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    mask = attention_mask(numbers.unsqueeze(0))
    if args:  # attention itself: query, key, value [positions, heads, width], mask
        return (*(x.unsqueeze(1) for x in args[:3]), mask), kwargs
    return args, {**kwargs, "attention_mask": mask}


def borders_as_full_mask(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """As above, where a position sees all of its document. The plain form comes without borders."""
    borders = kwargs.pop("packed_seq_params", None)
    if borders is None:
        return args, kwargs
    lengths = borders.cu_seqlens_q.diff()
    assert lengths.max() <= borders.max_seqlen_q
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return args, {**kwargs, "attention_mask": (numbers[:, None] != numbers)[None, None]}


def main() -> None:
    config, out = load_config(sys.argv[1]), Path(sys.argv[2])
    topology = initialize(config, launch())
    layout = layout_of(config)
    trainer = Trainer(config, topology, layout, SOURCES)
    if "--packed" in sys.argv:
        for chunk in trainer.chunks:
            chunk.borders = True
            exchanges = [m for m in chunk.modules() if isinstance(m, ContextParallelAttention)]
            for module in [m.inner for m in exchanges] or [chunk.language_model]:
                module.register_forward_pre_hook(borders_as_mask, with_kwargs=True)
            if chunk.vision is not None:
                chunk.vision.tile = 16
                chunk.vision.decoder.register_forward_pre_hook(borders_as_full_mask, with_kwargs=True)
    size = config.training.micro_batch_size
    for variant, counts in VARIANTS.items():
        bins = [list(range(i, i + size)) for i in range(0, config.training.global_batch_size, size)]
        mine = bins[topology.dp_rank :: topology.dp_size]
        result = trainer.forward_backward([microbatch(config, layout, counts, b, topology) for b in mine])
        save_file(gradients(trainer), out / f"{variant}.{topology.rank}.safetensors")
        record = {"loss": result.loss, "source_losses": result.source_losses, "images": result.images}
        record |= {"padding": result.padding, "image_imbalance": result.image_imbalance}
        trainer.optimizer.prepare_grads()
        record["grad_norm"] = float(trainer.optimizer.get_grad_norm())
        if topology.rank == 0:
            (out / f"{variant}.json").write_text(json.dumps(record))
    shut_down()


if __name__ == "__main__":
    main()
