"""The router of a layer with experts: Megatron-Core's top-k router, on which padding has no bearing.

All padding of a sequence is one token repeated, alike in every layer: routed by the scores, a third of a microbatch can
go to the same few experts, whose ranks all the others wait for, and the load-balance loss drives real tokens away from
them. Here padding goes to the experts in turn, with weight zero, and counts in neither router loss. So losses and
gradients are those of the same documents without padding.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.parallel.backend import import_megatron
from megatron_mm.parallel.versions import record_router_loss

import_megatron()

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402


class Router(TopKRouter):
    """Hidden states [s, b, h] and `padding_mask`, bool [s, b], true where padding is → weights and choice of the
    experts, [s · b, experts] each."""

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert padding_mask is not None
        weights, chosen = super().forward(input, padding_mask)
        padding = padding_mask.reshape(-1, 1)
        return weights.masked_fill(padding, 0.0), torch.where(padding, self._in_turn(chosen), chosen)

    def _in_turn(self, chosen: Tensor) -> Tensor:
        """A choice of the same form that has the experts one after the other."""
        positions, experts = chosen.shape
        turns = torch.arange(positions * self.topk, device=chosen.device).view(positions, self.topk)
        return torch.zeros_like(chosen).scatter_(1, turns % experts, True)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the z loss (ST-MoE, arXiv 2202.08906, equation 5): the mean over real positions of log² Σ exp.

        Of all ranks that share the sequences: Megatron-Core takes the mean of each rank's mean, in which a rank that
        holds padding mostly would count its few tokens as much as another all of its own.
        """
        if not (self.training and torch.is_grad_enabled()):
            return logits
        assert padding_mask is not None
        real = ~padding_mask
        count = real.sum()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(count, group=self.tp_cp_group)
        share = (logits.logsumexp(-1).square() * real).sum() / count
        record_router_loss("z_loss", share, self.layer_number, self.config.num_layers)
        return MoEAuxLossAutoScaler.apply(logits, share * self.config.moe_z_loss_coeff)
