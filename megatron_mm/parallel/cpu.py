"""Megatron-Core on CPU: the one place that patches. On a machine with a GPU nothing here does anything.

Megatron-Core asks for CUDA tensors, streams and random states by name in many places, yet its mathematics and its
collectives run on CPU tensors over gloo as they are. So this module answers those requests with CPU objects:

    torch.empty(..., device="cuda")   →  a CPU tensor            (factories, Tensor.new_*, .to, .cuda)
    torch.cuda.current_stream()       →  a stream that is always done
    torch.cuda random states          →  the CPU generator
    gloo's missing collectives        →  the same result from broadcasts and all-reduces

`enable()` must run before `megatron.core` is imported (it binds torch functions by value); `patch_collectives()`
after. Both are called by `megatron_mm.parallel.backend.import_megatron`, and by nothing else.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

_stand_in = torch.device("cpu")  # what plays CUDA's part
_FACTORIES = (
    "tensor as_tensor empty zeros ones full arange linspace eye rand randn randint randperm empty_like zeros_like "
    "ones_like full_like rand_like randn_like empty_strided"
).split()
_NEW_METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _stand_in
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapper


class _Event:
    """An event that has always happened: CPU work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return 0.0


class _Stream:
    cuda_stream = 0
    device = _stand_in

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Generators(dict[Any, torch.Generator]):
    """`torch.cuda.default_generators[i]` is the CPU generator for any i."""

    def __missing__(self, key: Any) -> torch.Generator:
        return torch.default_generator


_enabled = False


def let_stand_in(device: torch.device) -> None:
    """Let another device than the CPU play CUDA's part: `meta`, on which the planner builds models without memory."""
    global _stand_in
    _stand_in = device


def enable() -> None:
    """Answer requests for CUDA with CPU objects. Idempotent; before `megatron.core` is imported."""
    global _enabled
    if _enabled:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before megatron_mm.parallel.cpu.enable()")
    _enabled = True
    # Megatron's jit_fuser is torch.compile, whose start-up costs more than it gains on CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Where it is installed on a machine without a GPU, Megatron-Core would take its optimizer and norms, CUDA's alone.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    from torch.utils import _device

    # Cached: it must see the original factories, else torch.device("meta") contexts break.
    _device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _NEW_METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    _patch_tensor_methods()
    _patch_cuda_module()
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()  # it does: it plays the GPU's
    )


def _patch_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    original_to, original_type = tensor.to, tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _stand_in
        if args and _is_cuda(args[0]):
            args = (_stand_in, *args[1:])
        return original_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron-Core's optimizers sort parameters by comparing with 'torch.cuda.FloatTensor'.
        result = original_type(self, *args, **kwargs)
        if isinstance(result, str) and "cuda" not in result:
            return result.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.")
        return result

    tensor.to, tensor.type = to, type_
    tensor.cuda = tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, *args, **kwargs: None
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _patch_cuda_module() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()

    # One function object a name: torch's compiler keeps a table of them and refuses the same one under two names.
    for name in ("set_device", "synchronize", "empty_cache", "_lazy_init"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.nvtx.range_push, cuda.nvtx.range_pop = (lambda *args: None), (lambda *args: None)
    cuda.current_device = lambda: _stand_in  # used as `device=torch.cuda.current_device()` everywhere
    cuda.device_count = lambda: 1
    cuda.current_stream, cuda.default_stream = (lambda *args, **kwargs: stream), (lambda *args, **kwargs: stream)
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda.default_generators = _Generators()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(int(seed))


def patch_collectives() -> None:
    """gloo's gaps, after `megatron.core` was imported: split sizes on the host, uneven gathers and scatters."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The original converts only CUDA tensors; gloo's all_to_all_single takes no tensors as split sizes.
        return tensor.detach().cpu().numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_host

    dist: Any = torch.distributed
    if hasattr(dist.all_gather, "_uneven"):
        return
    even_all_gather, even_reduce_scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(tensor_list: list[Any], tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        if len({t.shape for t in tensor_list}) == 1:
            return even_all_gather(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for i, part in enumerate(tensor_list):
            dist.broadcast(part, group=group, group_src=i)

    def reduce_scatter(
        output: Any, input_list: list[Any], op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({t.shape for t in input_list}) == 1:
            return even_reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        for i, part in enumerate(input_list):
            part = part.clone()
            dist.all_reduce(part, op=op, group=group)
            if i == dist.get_rank(group):
                output.copy_(part)

    all_gather._uneven = True  # type: ignore[attr-defined]
    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter
