"""What a run keeps when it goes on from a checkpoint, its own or one that was made from another's."""

from typing import Any

from megatron_mm.config import RunConfig, config_to_dict
from megatron_mm.errors import UserError

# What decides which samples come and what the parameters are. Everything else may change: the layout, the precision,
# the number of steps, learning rates, intervals.
_FIXED = (
    "model", "data.sources", "data.seq_length", "data.max_images", "data.block_attention", "data.validation_fraction",
    "training.seed", "training.global_batch_size",
)  # fmt: skip


def check_same_run(before: RunConfig, now: RunConfig, fault: str, do: str, experts_may_differ: bool = False) -> None:
    """Raises UserError, worded as `fault` and `do`, unless the state of `before` is one that `now` can go on from."""
    for name in _FIXED:
        old, new = _value(before, name), _value(now, name)
        if name == "model" and experts_may_differ:
            old["decoder"]["moe"] = new["decoder"]["moe"] = None
        if old != new:
            if isinstance(old, dict):
                changed = [k for k in old if old[k] != new.get(k)]
                old, new = {k: old[k] for k in changed}, {k: new.get(k) for k in changed}
            raise UserError(fault, where=name, found=new, allowed=str(old), do=do)
    thawed = [part for part in before.training.frozen if part not in now.training.frozen]
    if thawed:
        raise UserError(
            f"{fault}: a part that was frozen has no optimizer state", where="training.frozen",
            found=list(now.training.frozen), allowed=f"with {', '.join(thawed)}", do=do,
        )  # fmt: skip


def _value(config: RunConfig, name: str) -> Any:
    data: Any = config_to_dict(config)
    for part in name.split("."):
        data = data[part]
    # A source may have moved.
    return [{k: v for k, v in s.items() if k != "path"} for s in data] if name == "data.sources" else data
