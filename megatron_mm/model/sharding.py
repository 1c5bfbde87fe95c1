"""Where each local parameter lies in the global model: names and boxes, the same in every layout.

Megatron-Core describes this in `sharded_state_dict()`. Here its answer is flattened to what checkpoints, initial
weights and comparisons need: for every local parameter, the pieces of it, each a contiguous view and a box in a
global tensor whose name holds the layer's global number.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A contiguous part of a local parameter and its place in a global tensor.

    Elements [start, start + numel) of the flattened parameter are, row by row, the box `offset`, `shape` of the
    global tensor `name` of `global_shape`.
    """

    name: str
    parameter: torch.nn.Parameter
    start: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    leading: int  # how many leading axes were added to the local tensor (1 for experts: the expert's number)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def view(self, flat: Tensor) -> Tensor:
        """This piece of a flattened tensor shaped like the parameter."""
        return flat[self.start : self.start + self.numel].view(self.shape)


def pieces(model: Any) -> Iterator[Piece]:
    """The pieces of every parameter of this rank's model (any `MegatronModule`), in the model's order."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    owners = sorted(model.parameters(), key=lambda p: p.data_ptr())
    addresses = [p.data_ptr() for p in owners]
    for entry in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for shard in _flatten(built):
            if not isinstance(shard, ShardedTensor):
                continue  # extra state of Transformer Engine layers, empty without FP8
            # A factory's parts are views into its parameter: the owner is found by address.
            data = shard.data
            assert data is not None
            assert data.is_contiguous()
            owner = owners[bisect.bisect_right(addresses, data.data_ptr()) - 1]
            start = (data.data_ptr() - owner.data_ptr()) // data.element_size()
            assert start + data.numel() <= owner.numel(), f"{shard.key} is no part of a parameter"
            yield Piece(
                name=_global_name(shard.key),
                parameter=owner,
                start=start,
                shape=(1,) * shard.prepend_axis_num + tuple(data.shape),
                offset=tuple(shard.global_offset),
                global_shape=tuple(shard.global_shape),
                leading=shard.prepend_axis_num,
            )


def _flatten(entry: Any) -> Iterator[Any]:
    if isinstance(entry, dict):
        entry = list(entry.values())
    if isinstance(entry, list | tuple):
        for item in entry:
            yield from _flatten(item)
    else:
        yield entry


def _global_name(key: str) -> str:
    """Megatron's key, freed of two traces of its implementation: the name that a norm has inside Transformer
    Engine's fused layers, and the doubled word of the expert modules."""
    key = key.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
    key = key.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
    return key.replace(".mlp.experts.experts.", ".mlp.experts.")
