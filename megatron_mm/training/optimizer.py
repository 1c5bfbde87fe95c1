"""MM1's optimizer: learning-rate law, schedule, Megatron-Core's optimizers, and their state as plain tensors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_mm.config import DecoderConfig, RunConfig

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


def non_embedding_parameters(decoder: DecoderConfig) -> int:
    """N of the learning-rate law: the dense decoder's matrices in its layers, without embeddings, output and norms.

    Experts do not count: MM1 trains a mixture of experts with the hyper-parameters of its dense backbone.
    """
    d, head = decoder.hidden_size, decoder.head_dim
    attention = d * head * (decoder.num_attention_heads + 2 * decoder.num_query_groups)
    attention += decoder.num_attention_heads * head * d
    return decoder.num_layers * (attention + 3 * d * decoder.ffn_hidden_size)


def mm1_learning_rate(non_embedding: float) -> float:
    """Peak learning rate, η = exp(-0.4214 ln N - 0.5535) (MM1, arXiv 2403.09611, section 3.3)."""
    return math.exp(-0.4214 * math.log(non_embedding) - 0.5535)


def peak_learning_rates(config: RunConfig) -> tuple[float, float]:
    """(encoder and decoder, connector)."""
    lr = config.optimizer.lr or mm1_learning_rate(non_embedding_parameters(config.model.decoder))
    return lr, config.optimizer.connector_lr or lr


def schedule(config: RunConfig, step: int) -> float:
    """Share of the peak at `step` (0-based): linear warm-up, then a cosine down to `min_lr_ratio` at the last step."""
    o, last = config.optimizer, config.training.steps - 1
    if step < o.warmup_steps:
        return (step + 1) / o.warmup_steps
    progress = (step - o.warmup_steps) / max(1, last - o.warmup_steps)
    return o.min_lr_ratio + (1 - o.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(config: RunConfig, chunks: list[Any]) -> "MegatronOptimizer":
    """Megatron-Core's optimizer over the wrapped model chunks: decoupled weight decay, on parameters of two or
    more dimensions alone (none on norms and biases; on embeddings of positions, as in Megatron-LM)."""
    from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer, get_standard_config_overrides

    o = config.optimizer
    lr, connector_lr = peak_learning_rates(config)
    megatron = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=0.0,  # the schedule is ours
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        decoupled_weight_decay=True,
        clip_grad=o.clip_grad,
        bf16=config.training.precision == "bf16",
        params_dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    overrides: dict[Any, Any] = dict(get_standard_config_overrides(megatron))
    overrides[ParamKey(name="*connector.*")] = {"max_lr": connector_lr}
    if o.vision_lr_scale != 1.0:
        overrides[ParamKey(name="*vision.*")] = {"max_lr": lr * o.vision_lr_scale}
    return get_megatron_optimizer(megatron, chunks, config_overrides=overrides)


def set_learning_rate(optimizer: "MegatronOptimizer", config: RunConfig, step: int) -> float:
    """Set every group's rate and decay for `step`; answers with the main group's rate."""
    share = schedule(config, step)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * share
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
    return peak_learning_rates(config)[0] * share


@dataclass(frozen=True)
class StatePart:
    """What one rank's optimizer holds of one parameter: elements [start, end) of it, flattened.

    `tensors` are the live ones, 1-D: `exp_avg` and `exp_avg_sq`, and `main`, the fp32 master, where the model
    computes in another type. Writing into them restores the optimizer.
    """

    parameter: torch.nn.Parameter
    start: int
    end: int
    tensors: dict[str, Tensor]


def state_parts(optimizer: "MegatronOptimizer") -> Iterator[StatePart]:
    """The state of each of Megatron-Core's optimizers in one form. Moments that do not exist yet are made (zeros)."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from _parts_of_one(part)


def _parts_of_one(part: Any) -> Iterator[StatePart]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    if part.optimizer is None:  # a stage without parameters of this kind
        return
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            main = part.optimizer.param_groups[group]["params"][order]
            held = part._get_model_param_range_map(parameter)["param"]
            yield _part(part, parameter, main, held.start, held.end)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        groups = [(part.float16_groups, part.fp32_from_float16_groups)]
        groups.append((part.fp32_from_fp32_groups, part.fp32_from_fp32_groups))
        for models, mains in groups:
            for model_group, main_group in zip(models, mains, strict=True):
                for parameter, main in zip(model_group, main_group, strict=True):
                    yield _part(part, parameter, main, 0, parameter.numel())
    else:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield _part(part, parameter, parameter, 0, parameter.numel())


def _part(part: Any, parameter: torch.nn.Parameter, main: Tensor, start: int, end: int) -> StatePart:
    state = part.optimizer.state[main]
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(main.data)
    if isinstance(part.optimizer, torch.optim.AdamW) and "step" not in state:
        state["step"] = torch.tensor(0.0)
    tensors = {name: state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")}
    if main.dtype != parameter.dtype:
        tensors["main"] = main.data.view(-1)
    return StatePart(parameter, start, end, tensors)


def set_adam_step(optimizer: "MegatronOptimizer", step: int) -> None:
    """Restore the number of updates done, which Adam's bias correction needs."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, torch.optim.AdamW):
                group["step"] = step  # Transformer Engine's and apex's keep one count a group
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(step))
