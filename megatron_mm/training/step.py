"""One optimizer step: the global batch's loss, its gradients, the update.

The loss is the mean over the text tokens of the whole global batch:

    L = Σ_i m_i · CE_i / Σ_i m_i        i over all positions of all sequences, m the loss mask

The divisor is counted over all data-parallel ranks before the forward pass, so the gradient is the same however the
sequences were dealt to ranks and microbatches, and a rank whose microbatch holds little or no text neither gains nor
loses weight. (Megatron-Core's own per-token mode divides the experts' auxiliary losses by the count of text tokens as
well, which image positions would inflate; here they keep their plain mean over microbatches.)
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.config import RunConfig, SequenceLayout
from megatron_mm.model.build import build_model
from megatron_mm.model.initialization import initialize_weights
from megatron_mm.model.multimodal import MultimodalModel
from megatron_mm.model.sharding import Piece, pieces
from megatron_mm.parallel.backend import device
from megatron_mm.parallel.topology import Topology
from megatron_mm.parallel.versions import take_router_losses
from megatron_mm.training.optimizer import build_optimizer, set_learning_rate

if TYPE_CHECKING:
    from megatron_mm.data.batch import Microbatch


@dataclass(frozen=True)
class StepResult:
    """Of one global batch, the same on every rank."""

    loss: float
    source_losses: list[float]  # mean over the source's text tokens; 0 where it had none in this batch
    source_tokens: list[int]  # text tokens that carry loss, by source
    positions: int  # of the sequences, padding included
    images: int
    padding: float = 0.0  # share of the positions that hold nothing
    image_imbalance: float = 1.0  # images of the slowest data-parallel rank over the mean, microbatch by microbatch
    grad_norm: float = 0.0  # before clipping
    learning_rate: float = 0.0
    expert_losses: dict[str, float] = field(default_factory=dict)  # load balance and z, means over MoE layers

    @property
    def text_tokens(self) -> int:
        """That carry loss."""
        return sum(self.source_tokens)


def wrap(config: RunConfig, chunks: Sequence[MultimodalModel]) -> list[Any]:
    """A rank's virtual stages in Megatron-Core's data-parallel wrapper, which holds parameters and gradients in common
    buffers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        average_in_collective=False,
        check_for_nan_in_grad=True,
    )
    wrapped = []
    for number, chunk in enumerate(chunks):
        module: Any = chunk
        if config.training.precision == "bf16":
            module = Float16Module(chunk.transformer, module)
        # Later chunks are small and reduced in one piece, as in Megatron-LM.
        wrapped.append(DistributedDataParallel(chunk.transformer, ddp, module, disable_bucketing=number > 0))
    return wrapped


class Trainer:
    """The model wrapped for data parallelism, its optimizer, and the steps over them.

    With `draw_weights` off it has none yet, and takes no step: a checkpoint gives them, or `draw_weights()` does.
    """

    def __init__(
        self, config: RunConfig, topology: Topology, layout: SequenceLayout, num_sources: int, draw_weights: bool = True
    ) -> None:
        self.config, self.topology, self.layout, self.num_sources = config, topology, layout, num_sources
        self.has_weights = draw_weights
        self.chunks: list[MultimodalModel] = build_model(config, draw_weights)
        self.transformer = self.chunks[0].transformer
        self.wrapped = wrap(config, self.chunks)
        self.optimizer = build_optimizer(config, self.wrapped)
        for chunk in self.chunks:
            chunk.transformer.grad_scale_func = self.optimizer.scale_loss
            chunk.transformer.finalize_model_grads_func = self._finalize_gradients
            if config.parallel.overlap_grad_reduce:
                no_sync = [wrapped.no_sync for wrapped in self.wrapped]
                chunk.transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def draw_weights(self, names: Collection[str] | None = None) -> None:
        """Initial weights and their masters: all, or of the tensors `names` where all others are filled already."""
        for chunk in self.chunks:
            initialize_weights(chunk, self.config, names)
        self.optimizer.reload_model_params()
        self.has_weights = True

    def pieces(self) -> Iterator[Piece]:
        """Where this rank's parameters lie in the global model."""
        for chunk in self.chunks:
            yield from pieces(chunk)

    @property
    def microbatches_per_step(self) -> int:
        """Of this rank, in one global batch."""
        t = self.config.training
        return t.global_batch_size // (t.micro_batch_size * self.topology.dp_size)

    def _finalize_gradients(self, model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Megatron-Core's, then the sum over the tensor-parallel group of what each rank's images gave to the
        replicated encoder and connector."""
        from megatron.core import parallel_state as mpu
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads(model, num_tokens, **kwargs)
        if self.topology.tp_size == 1:
            return
        # One by one and in place: a flat copy of all of them would be gigabytes.
        for parameter in (p for chunk in self.chunks for p in chunk.replicated_parameters()):
            dist.all_reduce(parameter.main_grad, group=mpu.get_tensor_model_parallel_group())  # type: ignore[attr-defined]

    def _run(self, batches: Sequence["Microbatch"], forward_only: bool) -> StepResult:
        from megatron.core import parallel_state as mpu
        from megatron.core.pipeline_parallel import get_forward_backward_func

        assert self.has_weights
        batches = [batch.to(device(), non_blocking=True) for batch in batches]
        text_tokens = torch.stack([b.loss_mask.sum() for b in batches]).sum().double()
        dist.all_reduce(text_tokens, group=mpu.get_data_parallel_group())
        # Megatron-Core divides by the microbatches and averages over data-parallel ranks; context-parallel ones, whose
        # losses are parts of the same sequences', it sums.
        scale = len(batches) * self.topology.dp_size / max(1.0, text_tokens.item())
        totals = torch.zeros(2, self.num_sources, dtype=torch.float64, device=device())  # loss, text tokens a source

        def loss_of(batch: "Microbatch", output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss_mask = self.chunks[0].own_positions(batch.loss_mask)
            losses = output.float() * loss_mask
            with torch.no_grad():
                totals[0].index_add_(0, batch.source_ids, losses.detach().sum(1).double())
                totals[1].index_add_(0, batch.source_ids, loss_mask.sum(1).double())
            return losses.sum() * scale, {}

        def forward_step(batches_left: Any, model: Any) -> tuple[Tensor, Any]:
            batch = next(batches_left)
            return model(batch, self.layout), functools.partial(loss_of, batch)

        micro = self.config.training.micro_batch_size
        iterators = [iter(batches) for _ in self.wrapped]  # each virtual stage goes through the same microbatches
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.wrapped,
            num_microbatches=len(batches),
            seq_length=self.layout.seq_length * (micro if self.chunks[0].packed else 1),
            micro_batch_size=1 if self.chunks[0].packed else micro,
            forward_only=forward_only,
        )
        # One sum over the world tells every rank: the last stage's first tensor-parallel ranks hold the losses.
        if not (self.topology.last_stage and self.topology.tp_rank == 0):
            totals.zero_()
        dist.all_reduce(totals)
        loss, tokens = totals.tolist()
        # Data-parallel ranks go through their microbatches side by side: who has most images at a time sets the pace.
        images = torch.tensor([b.num_images for b in batches], device=device())
        most = images.clone()
        padding = torch.stack([(b.documents < 0).sum() for b in batches]).sum()
        counts = torch.cat([images, padding.view(1)])
        dist.all_reduce(counts, group=mpu.get_data_parallel_group())
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=mpu.get_data_parallel_group())
        total, positions = int(counts[:-1].sum()), len(batches) * self.topology.dp_size * batches[0].tokens.numel()
        return StepResult(
            loss=sum(loss) / max(1.0, sum(tokens)),
            source_losses=[s / max(1.0, n) for s, n in zip(loss, tokens, strict=True)],
            source_tokens=[round(n) for n in tokens],
            positions=positions,
            images=total,
            padding=int(counts[-1]) / positions,
            image_imbalance=int(most.sum()) * self.topology.dp_size / total if total else 1.0,
        )

    def forward_backward(self, batches: Sequence["Microbatch"]) -> StepResult:
        """Gradients of one global batch in `main_grad`, reduced over all ranks; nothing is updated."""
        for wrapped in self.wrapped:
            wrapped.train()
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, forward_only=False)

    def train_step(self, batches: Sequence["Microbatch"], step: int) -> StepResult:
        """One update from this rank's microbatches of step `step` (0-based)."""
        result = self.forward_backward(batches)
        learning_rate = set_learning_rate(self.optimizer, self.config, step)
        _, grad_norm, _ = self.optimizer.step()
        return replace(
            result,
            grad_norm=float(grad_norm or 0.0),
            learning_rate=learning_rate,
            expert_losses=self._expert_losses(len(batches)),
        )

    def _expert_losses(self, microbatches: int) -> dict[str, float]:
        """The routers' auxiliary losses in this step, without their coefficients: means over layers with experts."""
        moe = self.config.model.decoder.moe
        if moe is None:
            return {}
        own = take_router_losses()
        # A rank records its share among the ranks that hold parts of its sequences, tensor- and context-parallel ones.
        # The load balance is not computed where it is not asked for.
        names = ("load_balancing_loss", "z_loss") if moe.load_balance_coeff else ("z_loss",)
        totals = torch.zeros(len(names), dtype=torch.float64, device=device())
        for i, name in enumerate(names):
            if name in own:  # not on a stage without experts
                totals[i] = own[name].sum() / (self.topology.dp_size * microbatches)
        dist.all_reduce(totals)
        layers = sum(self.transformer.moe_layer_freq)
        return {f"moe/{name}": total / layers for name, total in zip(names, totals.tolist(), strict=True)}

    @torch.no_grad()
    def evaluate(self, batches: Sequence["Microbatch"]) -> StepResult:
        """The loss of one global batch, without gradients."""
        for wrapped in self.wrapped:
            wrapped.eval()
        return self._run(batches, forward_only=True)
