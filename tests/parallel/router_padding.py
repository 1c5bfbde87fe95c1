"""One rank of the router's test: what padding does to routing, router losses and gradients.

python tests/parallel/router_padding.py CONFIG.yaml OUT_DIR
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_mm.config import load_config
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.router import Router
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import initialize, shut_down
from megatron_mm.parallel.versions import take_router_losses
from megatron_mm.training.step import Trainer
from tests.parallel.one_step import SOURCES, gradients, layout_of

REAL, PADDED = 28, 20  # positions of a sequence: more padding than a third


def batches(width: int) -> list[Microbatch]:
    """Four microbatches of two sequences, the same REAL positions of text for any width."""
    made = []
    for number in range(4):
        words = torch.randint(5, 128, (2, REAL + 1), generator=torch.Generator().manual_seed(number))
        rows = {"tokens": words[:, :-1], "labels": words[:, 1:], "loss_mask": torch.ones(2, REAL)}
        rows = {name: torch.nn.functional.pad(row, (0, width - REAL)) for name, row in rows.items()}
        documents = torch.full((2, width), -1, dtype=torch.int32)
        documents[:, :11], documents[:, 11:REAL] = 0, 1
        made.append(
            Microbatch(
                **rows,
                documents=documents,
                position_ids=torch.arange(width).expand(2, -1),
                source_ids=torch.zeros(2, dtype=torch.int64),
                sample_ids=torch.arange(2),
                images=torch.zeros(0, 3, 40, 40, dtype=torch.uint8),
                num_images=0,
            )
        )
    return made


def expected(router: Router, x: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Load-balance loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6, for top-k) and z loss, in float64."""
    logits = x @ router.weight.double().t()
    experts = logits.shape[1]
    share = torch.zeros_like(logits).scatter(1, logits.topk(topk).indices, 1.0).mean(0) / topk
    balance = experts * (share * logits.softmax(-1).mean(0)).sum()
    return balance, logits.exp().sum(-1).log().square().mean()


def main() -> None:
    config, out = load_config(sys.argv[1]), Path(sys.argv[2])
    topology = initialize(config, launch())
    trainer = Trainer(config, topology, layout_of(config), SOURCES)
    moe = config.model.decoder.moe
    assert moe is not None
    routers = [m for m in trainer.chunks[0].modules() if isinstance(m, Router)]
    record: dict = {"routers": len(routers)}

    chosen: list[torch.Tensor] = []
    for router in routers:
        router.register_forward_hook(lambda module, args, output: chosen.append(output[1]))
    for name, width in (("without", REAL), ("with", REAL + PADDED)):
        take_router_losses()
        chosen.clear()
        result = trainer.forward_backward(batches(width))
        losses = {k: v.tolist() for k, v in take_router_losses().items()}
        save_file(gradients(trainer), out / f"{name}.safetensors")
        to_padding = [choice.view(width, 2, -1)[REAL:].sum((0, 1)).tolist() for choice in chosen]
        record[name] = {"loss": result.loss, "router_losses": losses, "to_padding": to_padding}

    # One router by itself, against the formulas.
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    router, hidden = routers[0], config.model.decoder.hidden_size
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(24, 2, hidden, generator=generator)
    padding = torch.rand(24, 2, generator=generator) < 0.4
    take_router_losses()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))  # the schedule has set one over the microbatches
    router.train()
    weights, _ = router(x, padding)
    (found,) = torch.autograd.grad(weights.sum() * 0, [router.weight])
    balance, z = expected(router, x[~padding].double(), moe.topk)
    (right,) = torch.autograd.grad(moe.load_balance_coeff * balance + moe.z_loss_coeff * z, [router.weight])
    taken = {name: float(value.sum()) for name, value in take_router_losses().items()}
    record["alone"] = {
        "found": taken,
        "expected": {"load_balancing_loss": balance.item(), "z_loss": z.item()},
        "gradient_error": float((found - right).norm() / right.norm()),
        "padding_weights": float(weights[padding.view(-1)].abs().sum()),
        "real_weights": weights[~padding.view(-1)].sum(1).tolist(),
    }
    router.config.moe_z_loss_coeff = 0.0
    router(x, padding)
    record["z_loss_of_no_weight"] = float(take_router_losses()["z_loss"].sum())
    (out / "record.json").write_text(json.dumps(record))
    shut_down()


if __name__ == "__main__":
    main()
