"""Sparse upcycling (arXiv 2212.05055): a dense checkpoint → one with experts, each a copy of its layer's FFN.

A token's gates over its top-k experts add up to one, so right after it the model computes what the dense one did.
Checkpoints hold global tensors, so dense and sparse run may have any layouts.

With the optimizer's state, an expert's moments are those of the FFN, divided by the number of experts (the second
moment by its square): that is what an expert's gradient is of the dense one when tokens spread evenly, and Adam's step
keeps its size. The routers start at random, with zero moments.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_mm.config import DecoderConfig, RunConfig
from megatron_mm.errors import UserError
from megatron_mm.model.seeding import normal
from megatron_mm.training.checkpoint_files import OPTIMIZER_PREFIXES, CheckpointReader
from megatron_mm.training.same_run import check_same_run

_MATRICES = ("linear_fc1", "linear_fc2")


def check_upcycling(dense: RunConfig, sparse: RunConfig, with_optimizer: bool = False) -> None:
    """Raises UserError unless the sparse run's model is the dense one's with experts in place of FFNs and, with the
    optimizer's state, the sparse run goes on with the samples that the dense one would have seen."""
    if dense.model.decoder.moe is not None:
        raise UserError("the checkpoint has experts already", where="model.decoder.moe", found=dense.model.decoder.moe)
    moe = sparse.model.decoder.moe
    if moe is None:
        raise UserError("the config has no experts", where="model.decoder.moe", found=None, do="set it")
    ffn = dense.model.decoder.ffn_hidden_size
    if moe.ffn_hidden_size not in (None, ffn):
        raise UserError(
            "an expert is a copy of the FFN", where="model.decoder.moe.ffn_hidden_size", found=moe.ffn_hidden_size,
            allowed=f"{ffn}, or leave it out",
        )  # fmt: skip
    d, s = dense.model, sparse.model
    for part in ("vision", "connector", "decoder"):
        before, now = getattr(d, part), getattr(s, part)
        for name in before.__dataclass_fields__:
            if name != "moe" and getattr(before, name) != getattr(now, name):
                raise UserError(
                    "differs from the dense model", where=f"model.{part}.{name}", found=getattr(now, name),
                    allowed=str(getattr(before, name)),
                )  # fmt: skip
    if with_optimizer:
        check_same_run(
            dense, sparse, fault="differs from the dense run", experts_may_differ=True,
            do="keep it, or leave out --optimizer and start a new run with checkpoint.init_from",
        )  # fmt: skip


def upcycle(
    reader: CheckpointReader, sparse: RunConfig, noise: float = 0.0, with_optimizer: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor of the sparse checkpoint, one at a time.

    Args:
        sparse: the run that will start from it; its seed draws routers and noise.
        noise: standard deviation of what is added to each expert's copy, as a share of the matrix's own; it tells
            experts apart from the start, at the price of the equality with the dense model.
        with_optimizer: the moments and fp32 masters too.
    """
    check_upcycling(reader.config, sparse, with_optimizer)
    for name in reader.index["tensors"]:
        prefix = next((p for p in OPTIMIZER_PREFIXES if name.startswith(p)), "")
        if prefix and not with_optimizer:
            continue
        plain = name.removeprefix(prefix)
        matrix = _expert_matrix(plain, sparse.model.decoder)
        if not matrix:
            yield name, reader.tensor(name)
            continue
        layer = plain.removesuffix(f".{matrix}.weight")
        yield f"{prefix}{layer}.experts.{matrix}.weight", _experts(reader.tensor(name), prefix, plain, sparse, noise)
        if matrix == _MATRICES[0]:
            yield f"{prefix}{layer}.router.weight", _router(reader.tensor(name), prefix, layer, sparse)


def _expert_matrix(name: str, d: DecoderConfig) -> str:
    """linear_fc1 or linear_fc2 where the tensor is that of a layer that will hold experts; else ""."""
    assert d.moe is not None
    parts = name.split(".")
    if parts[:3] != ["language_model", "decoder", "layers"] or parts[4] != "mlp" or parts[5] not in _MATRICES:
        return ""
    return parts[5] if (int(parts[3]) + 1) % d.moe.layer_freq == 0 else ""


def _experts(dense: Tensor, prefix: str, name: str, sparse: RunConfig, noise: float) -> Tensor:
    moe = sparse.model.decoder.moe
    assert moe is not None
    if prefix in ("exp_avg/", "exp_avg_sq/"):
        share = moe.num_experts if prefix == "exp_avg/" else moe.num_experts**2
        return (dense / share).expand(moe.num_experts, *dense.shape)
    if not noise:
        return dense.expand(moe.num_experts, *dense.shape)
    std = noise * dense.float().std().item()
    copies = [
        dense.float() + normal(sparse.training.seed, f"upcycling/{name}#{expert}", tuple(dense.shape), std)
        for expert in range(moe.num_experts)
    ]
    return torch.stack(copies).to(dense.dtype)


def _router(dense: Tensor, prefix: str, layer: str, sparse: RunConfig) -> Tensor:
    moe = sparse.model.decoder.moe
    assert moe is not None
    shape = (moe.num_experts, dense.shape[1])
    if prefix in ("exp_avg/", "exp_avg_sq/"):
        return torch.zeros(shape, dtype=dense.dtype)
    return normal(sparse.training.seed, f"{layer}.router.weight", shape, sparse.model.init_std).to(dense.dtype)
