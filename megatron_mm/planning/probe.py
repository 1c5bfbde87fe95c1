"""One rank of every pipeline stage, built and run on the meta device in a world that does not exist.

    python -m megatron_mm.planning.probe < job.json > stages.json      (`measure.py` does)

Real modules, real data-parallel buffers, real optimizer, a real forward and backward pass of one microbatch; torch's
fake process group stands for the other ranks, meta tensors for memory. What cannot run so has a stand-in
(`standins.py`). A process of its own, since Megatron-Core's state is global and here belongs to a false world.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mm.config import RunConfig, SequenceLayout, config_from_dict
from megatron_mm.parallel import cpu
from megatron_mm.parallel.backend import import_megatron
from megatron_mm.planning.live import LiveBytes
from megatron_mm.planning.memory import ChunkBytes, StageBytes
from megatron_mm.planning.stages import stages

META = torch.device("meta")


def probe(config: RunConfig, world_size: int, imbalance: float, gpu: bool = True) -> list[StageBytes]:
    """Bytes of one rank of each stage. The worst rank's: all images that a microbatch can hold, the larger share.

    Args:
        imbalance: tokens that the busiest expert-parallel rank gets, over the mean.
        gpu: as on a GPU; False: as on a CPU, with its kernels.
    """
    import_megatron()
    from megatron_mm.planning.standins import SelectTopk, use_balanced_dispatcher

    cpu.let_stand_in(META)
    use_balanced_dispatcher(imbalance)
    moe = config.model.decoder.moe
    held = stages(config)
    found: dict[Any, StageBytes] = {}
    for number, stage in enumerate(held):
        if stage not in found:  # inner stages are mostly alike
            _join(config, number * world_size // len(held), world_size)
            with META, SelectTopk(moe.topk if moe else 0):
                found[stage] = _measure(config, gpu)
            _leave()
    return [found[stage] for stage in held]


def _join(config: RunConfig, rank: int, world_size: int) -> None:
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    p = config.parallel
    virtual = p.virtual_pipeline_model_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    with _fake_groups_only():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=p.tensor_model_parallel_size,
            pipeline_model_parallel_size=p.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            context_parallel_size=p.context_parallel_size,
            expert_model_parallel_size=p.expert_model_parallel_size,
            expert_tensor_parallel_size=p.expert_tp,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(0)


@contextlib.contextmanager
def _fake_groups_only() -> Iterator[None]:
    """Megatron-Core also asks for groups over gloo, which would look for the other ranks."""
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})
    try:
        yield
    finally:
        dist.new_group = new_group


def _leave() -> None:
    from megatron.core import parallel_state as mpu

    mpu.destroy_model_parallel()
    dist.destroy_process_group()


def _measure(config: RunConfig, gpu: bool) -> StageBytes:
    from megatron_mm.model.build import build_chunks
    from megatron_mm.planning.standins import like_gpu, like_transformer_engine
    from megatron_mm.training.optimizer import build_optimizer, state_parts
    from megatron_mm.training.step import wrap

    transformer_engine = gpu and config.training.layers != "local"
    # Transformer Engine cannot be built here, nor FP8: local layers stand for its own.
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, layers="local", fp8=None))
    chunks = build_chunks(config)
    for chunk in chunks:
        if gpu:
            like_gpu(chunk)
        if transformer_engine:
            like_transformer_engine(chunk, chunk.transformer)
    wrapped = wrap(config, chunks)
    optimizer = build_optimizer(config, wrapped)
    parameters = [p.data for chunk in chunks for p in chunk.parameters()]
    gradients = [b.grad_data for w in wrapped for b in (*w.buffers, *w.expert_parallel_buffers)]
    state = [t for part in state_parts(optimizer) for t in part.tensors.values()]
    batch, layout = _microbatch(config, chunks[0].pre_process)
    return StageBytes(
        parameters=storage_bytes(parameters),
        gradients=storage_bytes(gradients),
        optimizer=storage_bytes(state),
        microbatch=storage_bytes([t for t in vars(batch).values() if isinstance(t, torch.Tensor)]),
        chunks=tuple(_run(config, c, w, batch, layout) for c, w in zip(chunks, wrapped, strict=True)),
    )


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the storages behind tensors, each counted once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def _microbatch(config: RunConfig, first_stage: bool) -> tuple[Any, SequenceLayout]:
    from megatron_mm.data.batch import Microbatch

    b, s, p = config.training.micro_batch_size, config.data.seq_length, config.parallel
    size = config.model.vision.image_size
    layout = SequenceLayout(
        seq_length=s, max_images=config.data.max_images, tokens_per_image=config.model.connector.num_tokens,
        image_size=size, image_token_id=4, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    images = config.data.max_images * b
    share = -(-images // p.image_sharers)

    def empty(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    batch = Microbatch(
        tokens=empty(b, s), labels=empty(b, s), position_ids=empty(b, s), source_ids=empty(b), sample_ids=empty(b),
        loss_mask=empty(b, s, dtype=torch.float32), documents=empty(b, s, dtype=torch.int32), num_images=images,
        images=empty(share if first_stage else 0, 3, size, size, dtype=torch.uint8),
    )  # fmt: skip
    return batch, layout


def _run(config: RunConfig, chunk: Any, wrapped: Any, batch: Any, layout: SequenceLayout) -> ChunkBytes:
    """A forward and a backward pass through one virtual stage, as Megatron-Core's schedules run them."""
    existing = [p.data for p in chunk.parameters()] + [p.main_grad for p in chunk.parameters() if p.requires_grad]
    existing += [t for t in vars(batch).values() if isinstance(t, torch.Tensor)]
    with LiveBytes(existing) as held, wrapped.no_sync():
        if not chunk.pre_process:
            dtype = chunk.transformer.params_dtype
            chunk.set_input_tensor(torch.empty(_hidden_shape(config), dtype=dtype, device=META, requires_grad=True))
        output = wrapped(batch, layout)
        result = (output.float() * chunk.own_positions(batch.loss_mask)).sum() if chunk.post_process else output
        kept, forward_peak = held.now, held.peak
        held.restart_peak()
        if result.requires_grad:
            result.backward(None if chunk.post_process else torch.empty_like(result))
        backward_peak = held.peak
        del output, result
        chunk.set_input_tensor(None)
        # What is left is no microbatch's own: buffers that Megatron-Core uses again and again.
        return ChunkBytes(kept=kept - held.now, forward_peak=forward_peak, backward_peak=backward_peak)


def _hidden_shape(config: RunConfig) -> tuple[int, int, int]:
    p = config.parallel
    rows = config.data.seq_length // p.context_parallel_size
    rows //= p.tensor_model_parallel_size if p.sequence_parallel else 1
    return rows, config.training.micro_batch_size, config.model.decoder.hidden_size


def main() -> None:
    """Layouts one after the other, of one model: Megatron-Core keeps records of its layers that outlive its groups."""
    job = json.load(sys.stdin)
    for config in job["configs"]:
        found = probe(config_from_dict(config), job["world_size"], job["expert_imbalance"], job["gpu"])
        print(json.dumps([dataclasses.asdict(stage) for stage in found]), flush=True)


if __name__ == "__main__":
    main()
