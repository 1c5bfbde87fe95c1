"""What Megatron-Core needs mended for its local (not Transformer Engine) layers, on a GPU as on a CPU.

Every supported release needs it. Layers of Transformer Engine never reach the mended code.
"""

from typing import Any


def apply() -> None:
    """Idempotent; after `megatron.core` was imported."""
    _norm_under_sequence_parallelism()


def _norm_under_sequence_parallelism() -> None:
    """The torch norm refuses sequence parallelism. The norm is per token, so all it lacks is the mark
    by which `finalize_model_grads` sums its gradient over the tensor-parallel group."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original: Any = WrappedTorchNorm.__new__
    if hasattr(original, "_marks_sequence_parallel"):
        return

    def new(cls: type, config: Any, hidden_size: int, *args: Any, **kwargs: Any) -> Any:
        sequence_parallel = config.sequence_parallel
        config.sequence_parallel = False
        try:
            module = original(cls, config, hidden_size, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in module.parameters():
            parameter.sequence_parallel = sequence_parallel
        return module

    new._marks_sequence_parallel = True  # type: ignore[attr-defined]
    WrappedTorchNorm.__new__ = new
