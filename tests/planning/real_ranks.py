"""One rank of the comparison: what real ranks hold in one training step of each layout.

    python tests/planning/real_ranks.py OUT_DIR CONFIG.yaml …

Rank r writes OUT_DIR/N.r.json for the N-th configuration: bytes of parameters, gradients and optimizer state after a
step; the most bytes that autograd kept at any moment of it, counted by hooks on the tensors that it saves; and the most
that were alive at any moment, with what no tensor was saved of.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.config import RunConfig, load_config
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import Topology, initialize, meet, shut_down
from megatron_mm.planning.live import LiveBytes
from megatron_mm.training.step import Trainer
from tests.parallel.one_step import layout_of, microbatch


class SavedBytes:
    """Bytes of the storages behind the tensors that autograd holds for its backward pass."""

    def __init__(self, exclude: list[torch.Tensor]) -> None:
        self.now = self.most = 0
        self.exclude = {t.untyped_storage().data_ptr() for t in exclude}
        self.users: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> "Saved":
        return Saved(self, tensor)


class Saved:
    """One tensor that autograd saved; gone when autograd lets go of it."""

    def __init__(self, account: SavedBytes, tensor: torch.Tensor) -> None:
        self.account, self.tensor = account, tensor
        storage = tensor.untyped_storage()
        self.address, self.size = storage.data_ptr(), storage.nbytes()
        if self.address in account.exclude:
            self.size = 0
        elif account.users.get(self.address, 0) == 0:
            account.now += self.size
            account.most = max(account.most, account.now)
        account.users[self.address] = account.users.get(self.address, 0) + 1

    def __del__(self) -> None:
        self.account.users[self.address] -= 1
        if self.account.users[self.address] == 0:
            self.account.now -= self.size


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}


def optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    """Everything of more than one number that torch's optimizers point to."""
    found = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                found.append(parameter.data)
                found += [t for t in part.optimizer.state[parameter].values() if torch.is_tensor(t) and t.dim() > 0]
    return found


def one_step(config: RunConfig, topology: Topology) -> dict[str, int]:
    layout = layout_of(config)
    trainer = Trainer(config, topology, layout, 3)
    size, images = config.training.micro_batch_size, config.data.max_images
    counts = [images] * config.training.global_batch_size
    bins = [list(range(i, i + size)) for i in range(0, len(counts), size)]
    batches = [microbatch(config, layout, counts, b, topology) for b in bins[topology.dp_rank :: topology.dp_size]]
    parameters = [p.data for chunk in trainer.chunks for p in chunk.parameters()]
    gradients = [b.grad_data for w in trainer.wrapped for b in (*w.buffers, *w.expert_parallel_buffers)]
    inputs = [t for batch in batches for t in vars(batch).values() if torch.is_tensor(t)]
    saved = SavedBytes([*parameters, *gradients, *inputs])
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda s: s.tensor):
        trainer.train_step(batches, 0)
    with LiveBytes([*parameters, *gradients, *inputs]) as live:
        trainer.forward_backward(batches)
    state = storages(optimizer_tensors(trainer.optimizer))
    held = storages(parameters)
    return {
        "parameters": sum(held.values()),
        "gradients": sum(storages(gradients).values()),
        "optimizer": sum(size for address, size in state.items() if address not in held),
        "saved": saved.most,
        "live": live.peak,
        "stage": topology.rank * config.parallel.pipeline_model_parallel_size // topology.world_size,
    }


def main() -> None:
    out, started = Path(sys.argv[1]), launch()
    store = meet(started)
    for number, path in enumerate(sys.argv[2:]):
        config = load_config(path)
        topology = initialize(config, started, dist.PrefixStore(str(number), store))
        (out / f"{number}.{topology.rank}.json").write_text(json.dumps(one_step(config, topology)))
        shut_down()


if __name__ == "__main__":
    main()
