"""A rank's part of the model, ready to train: built, placed, initialised, marked, frozen."""

from collections.abc import Sequence

import torch

from megatron_mm.config import RunConfig
from megatron_mm.model.initialization import initialize_weights
from megatron_mm.model.multimodal import MultimodalModel
from megatron_mm.model.sharding import pieces
from megatron_mm.parallel.backend import device, import_megatron

import_megatron()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core import tensor_parallel  # noqa: E402


def build_chunks(config: RunConfig) -> list[MultimodalModel]:
    """This rank's virtual stages (one, without virtual pipeline parallelism), frozen as asked, their weights not drawn
    yet. Groups must exist."""
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for chunk in range(virtual):
        stage = {"ignore_virtual": False, "vp_stage": chunk} if virtual > 1 else {}
        first, last = mpu.is_pipeline_first_stage(**stage), mpu.is_pipeline_last_stage(**stage)
        model = MultimodalModel(config, first, last, chunk if virtual > 1 else None)
        _freeze(model, config.training.frozen)
        chunks.append(model)
    return chunks


def build_model(config: RunConfig, draw_weights: bool = True) -> list[MultimodalModel]:
    """The same on this rank's device, with their initial weights."""
    chunks = build_chunks(config)
    for model in chunks:
        model.to(device())
        if draw_weights:
            initialize_weights(model, config)
        _mark_tensor_parallel(model)
    return chunks


def _freeze(model: MultimodalModel, frozen: Sequence[str]) -> None:
    parts = {"vision": model.vision, "connector": model.connector, "decoder": model.language_model}
    for name in frozen:
        part = parts[name]
        if part is not None:
            part.requires_grad_(False)


def _mark_tensor_parallel(model: MultimodalModel) -> None:
    """Tell Megatron-Core which parameters are parts over the tensor-parallel group: gradient norms count those on
    every rank and all others once. It marks them as it initialises them, which it does not do here."""
    held: dict[torch.nn.Parameter, int] = {}
    whole: dict[torch.nn.Parameter, int] = {}
    for piece in pieces(model):
        held[piece.parameter] = held.get(piece.parameter, 0) + piece.numel
        whole[piece.parameter] = torch.Size(piece.global_shape[piece.leading :]).numel()
    for parameter in model.parameters():
        assert held[parameter] == parameter.numel()  # so whoever fills all pieces fills all parameters
        # Experts always count: their groups hold no tensor-parallel copies, whatever the expert tensor-parallel size.
        expert = not getattr(parameter, "allreduce", True)
        parameter.tensor_model_parallel = expert or held[parameter] < whole[parameter]
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
