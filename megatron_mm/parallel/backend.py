"""The door to Megatron-Core: `import_megatron()` before any `megatron.core` import, anywhere in the package.

On a GPU machine it imports Megatron-Core and changes nothing but what a missing Transformer Engine breaks
(`without_te.py`) and what its releases do differently (`versions.py`).
On a CPU machine it first puts CPU objects where Megatron-Core asks for CUDA's (see `cpu.py`).
"""

import functools
import logging
import warnings

import torch

from megatron_mm.errors import UserError
from megatron_mm.parallel import cpu, versions, without_te


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank's tensors live (the current CUDA device, or the CPU)."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def _quieten() -> None:
    """Keep out of users' logs what they can do nothing about: Megatron-Core's remarks on each optional package that
    is absent, its reads of `.grad` from shards, its calls that newer torch has renamed, its idle rerun machinery."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)


@functools.cache
def import_megatron() -> None:
    """Idempotent; raises UserError where Megatron-Core is missing."""
    if not on_gpu():
        cpu.enable()
    _quieten()
    versions.before_import(on_gpu())
    try:
        import megatron.core
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Megatron-Core is not importable", found=str(error), do="pip install 'megatron-core>=0.16.1,<0.20'"
        ) from error
    versions.after_import()
    without_te.apply()
    if not on_gpu():
        cpu.patch_collectives()
