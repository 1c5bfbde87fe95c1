"""Process groups: torch.distributed, Megatron-Core's model-parallel groups, and this rank's place in them."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_mm.config import RunConfig, check_layout
from megatron_mm.errors import UserError
from megatron_mm.parallel.backend import device, import_megatron, on_gpu
from megatron_mm.parallel.launch import Launch

# A rank that waits longer than this for the others reports instead of hanging. Checkpoints of large models
# are written by threads, so no collective waits for a disk.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=20)
# Packing a large corpus for the first time takes long, and is waited for without a collective.
PREPARATION_TIMEOUT = datetime.timedelta(hours=12)


@dataclass(frozen=True)
class Topology:
    """This rank's place. Sizes are those of `config.parallel`; `dp` is what is left of the world."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    first_stage: bool  # holds the encoder, the connector and the token embeddings
    last_stage: bool  # computes the loss
    images_dealt: bool = True  # over the tensor-parallel ranks too; False: they encode the same ones

    @property
    def image_share(self) -> tuple[int, int] | None:
        """Which part of a microbatch's images this rank decodes and encodes; None: it needs no pixels."""
        if not self.first_stage:
            return None
        if not self.images_dealt:
            return self.cp_rank, self.cp_size
        return self.cp_rank * self.tp_size + self.tp_rank, self.cp_size * self.tp_size


def meet(launch: Launch) -> dist.Store:
    """The ranks' common key-value store. No device and no process group is taken yet."""
    store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=PREPARATION_TIMEOUT))
    return store


def once_a_node(action: Callable[[], None], launch: Launch, store: dist.Store) -> None:
    """Run `action` on the first rank of each node while the others wait. Its UserError on any becomes everyone's."""
    if launch.local_rank == 0:
        try:
            action()
        except UserError as error:
            store.set("preparation failed", str(error))
    if store.add("prepared", 1) == launch.world_size:
        store.set("all prepared", "yes")
    store.wait(["all prepared"], PREPARATION_TIMEOUT)
    if store.check(["preparation failed"]):
        told = UserError(store.get("preparation failed").decode())
        told.everywhere = True
        if store.add("told", 1) == launch.world_size:
            store.set("all told", "yes")
        if launch.rank == 0:  # the store lives in this process: it may end when all have read from it
            store.wait(["all told"], datetime.timedelta(minutes=1))
        raise told


def initialize(config: RunConfig, launch: Launch, store: dist.Store | None = None) -> Topology:
    """Join the world and build the groups. The layout is checked before any process group or device is taken.

    Args:
        store: where the ranks have met already; None: they meet here.
    """
    check_layout(config, launch.world_size)
    import_megatron()
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    if on_gpu():
        torch.cuda.set_device(launch.local_rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // launch.local_world_size))
    dist.init_process_group(
        "nccl" if on_gpu() else "gloo",
        store=store or meet(launch),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    p = config.parallel
    virtual = p.virtual_pipeline_model_parallel_size
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=p.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=p.context_parallel_size,
        expert_model_parallel_size=p.expert_model_parallel_size,
        expert_tensor_parallel_size=p.expert_tp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=mpu.get_context_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        first_stage=mpu.is_pipeline_first_stage(),
        last_stage=mpu.is_pipeline_last_stage(),
        images_dealt=not p.vision_tensor_parallel,
    )


def shut_down() -> None:
    from megatron.core import parallel_state as mpu

    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def all_max(value: int) -> int:
    """The largest of all ranks' values: how ranks agree on a flag."""
    tensor = torch.tensor(value, dtype=torch.int64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())
