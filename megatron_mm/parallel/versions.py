"""Where the supported releases of Megatron-Core differ, 0.16.1 (the newest for Python 3.11) up to 0.19.

What a release lacks is put in its place at import; what has moved is asked for here. The rest of the package is written
for all of them alike. Both ends are run by CI: `make test-newest-megatron`.
"""

import functools
import importlib.util
import logging
import sys
import types
from typing import Any

from torch import Tensor


def before_import(on_gpu: bool) -> None:
    """Idempotent; before `megatron.core` is imported."""
    if not on_gpu and importlib.util.find_spec("triton") is None:
        _stand_in_for_triton_kernels()
    _quieten()


def after_import() -> None:
    """Idempotent; after `megatron.core` was imported."""
    _router_without_te()


def _stand_in_for_triton_kernels() -> None:
    """0.19 imports triton from one leaf module at import time; none of its kernels runs on CPU."""
    name = "megatron.core.transformer.moe.ops.paged_stash"
    module: Any = types.ModuleType(name)
    module.GLOBAL_BLOCK_SIZE = 1024
    module.paged_stash_copy_kernel = module.paged_stash_pop_kernel = None
    sys.modules[name] = module


# What 0.19 says at every start, by the logger that says it. HybridModel is the successor of GPTModel, which holds the
# same layers; a layout of buffers that is not handed over is computed inside, the same one.
_KNOWN_REMARKS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
}


def _quieten() -> None:
    for name, remark in _KNOWN_REMARKS.items():
        logger = logging.getLogger(name)
        if not logger.filters:
            logger.addFilter(_Without(remark))


class _Without(logging.Filter):
    """Lets pass every message but one."""

    def __init__(self, remark: str) -> None:
        super().__init__()
        self.remark = remark

    def filter(self, record: logging.LogRecord) -> bool:
        return self.remark not in record.getMessage()


def _router_without_te() -> None:
    """0.16.1: the router looks up a name that only the import of Transformer Engine defines."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def set_router(layer: Any, router: type) -> None:
    """Let a layer of this specification, where it has experts, build a `router` of this class."""
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    mlp = layer.submodules.mlp
    submodules = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules  # 0.19, 0.16
    if isinstance(submodules, MoESubmodules):
        submodules.router = router


def record_router_loss(name: str, value: Tensor, layer_number: int, num_layers: int) -> None:
    """Add to Megatron-Core's record what `take_router_losses` takes from it. `layer_number` counts from 1."""
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):  # 0.19
        moe_utils.get_moe_metrics_tracker().record(name, value, layer_number, num_layers)
    else:
        moe_utils.save_to_aux_losses_tracker(name, value, layer_number, num_layers)


def take_router_losses() -> dict[str, Tensor]:
    """Megatron-Core's record of the routers' auxiliary losses, by name, each layer's sum over this rank's microbatches
    without its coefficient; the record starts anew. Empty where no router was trained.

    Values are this rank's own. (The releases differ in which of them their own reports then average over what ranks,
    and all of them leave a share unsummed on stages without experts.)
    """
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):  # 0.19
        entries = moe_utils.get_moe_metrics_tracker().metrics
        values = {name: entry.values for name, entry in entries.items()}
    else:
        entries = moe_utils.get_moe_layer_wise_logging_tracker()
        values = {name: entry["values"] for name, entry in entries.items()}
    taken = {name: value.float().clone() for name, value in values.items()}
    for value in values.values():
        value.zero_()
    return taken
