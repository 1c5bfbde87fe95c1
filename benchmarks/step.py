"""A training step of ours beside one of bare Megatron-Core, on text: what the layer around it costs.

Same decoder, same weights' shapes, same batches and optimizer, one rank, in one process, in turns. Bare: GPTModel in
Megatron-Core's DistributedDataParallel, its schedule and optimizer, with a causal mask. Ours: `Trainer.train_step` with
everything that a run does in a step (documents' mask, loss by source, counts over all ranks). Seconds of wall time.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from common import Stopwatch, finish, options, take_turns

from megatron_mm.config import RunConfig, SequenceLayout, config_from_dict
from megatron_mm.data.batch import Microbatch
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import initialize, shut_down

TARGET = 1.05


def run_config(smoke: bool) -> RunConfig:
    """12 layers of 256, 512 positions, 4 microbatches; smoke: 2 layers of 64."""
    layers, width, length = (2, 64, 64) if smoke else (12, 256, 512)
    return config_from_dict(
        {
            "run_dir": "unused",
            "model": {
                "vision": {
                    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "ffn_hidden_size": 128,
                    "patch_size": 14, "image_size": 56,
                },
                "connector": {"num_tokens": 4, "hidden_size": 64, "depth": 1},
                "decoder": {
                    "num_layers": layers, "hidden_size": width, "num_attention_heads": 4, "num_query_groups": 4,
                    "ffn_hidden_size": 4 * width, "vocab_size": 1024, "family": "llama",
                },
            },
            "data": {"tokenizer": "unused", "sources": [{"path": "unused", "weight": 1}], "seq_length": length},
            "training": {"steps": 1000, "global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32"},
            "optimizer": {"lr": 1e-4},
        }
    )  # fmt: skip


def batches(config: RunConfig) -> list[Microbatch]:
    """One document a sequence: then both masks allow the same."""
    s = config.data.seq_length
    found = []
    for number in range(config.training.global_batch_size):
        tokens = torch.randint(5, 1024, (1, s + 1), generator=torch.Generator().manual_seed(number))
        found.append(
            Microbatch(
                tokens=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous(), loss_mask=torch.ones(1, s),
                documents=torch.zeros(1, s, dtype=torch.int32), position_ids=torch.arange(s).unsqueeze(0),
                source_ids=torch.zeros(1, dtype=torch.int64), sample_ids=torch.tensor([number]),
                images=torch.zeros((0, 3, 56, 56), dtype=torch.uint8), num_images=0,
            )
        )  # fmt: skip
    return found


class Bare:
    """Megatron-Core's own loop, as its examples write it."""

    def __init__(self, config: RunConfig) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from megatron_mm.model.decoder import build_decoder, transformer_config

        transformer = transformer_config(config)
        model = build_decoder(config, transformer, True, True, None)
        for name, parameter in model.named_parameters():
            torch.nn.init.constant_(parameter, 1.0) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
            parameter.tensor_model_parallel = False
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(transformer, ddp, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-4, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True),
            [self.model],
        )
        transformer.finalize_model_grads_func = finalize_model_grads
        self.length = config.data.seq_length

    def step(self, given: list[Microbatch]) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        mask = torch.ones(1, 1, self.length, self.length, dtype=torch.bool).triu(1)

        def loss_of(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            loss = (output.float() * loss_mask).sum() / loss_mask.sum()
            return loss, {"loss": loss.detach().clone()}

        def forward_step(iterator: Iterator[Microbatch], model: Any) -> tuple[torch.Tensor, Any]:
            batch = next(iterator)
            output = model(batch.tokens, batch.position_ids, mask, labels=batch.labels)
            return output, functools.partial(loss_of, batch.loss_mask)

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(given), model=[self.model], num_microbatches=len(given),
            seq_length=self.length, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        self.optimizer.step()


def main() -> None:
    chosen = options(__doc__ or "", rounds=15)
    config = run_config(chosen.smoke)
    topology = initialize(config, launch())
    from megatron_mm.training.step import Trainer

    layout = SequenceLayout(
        seq_length=config.data.seq_length, max_images=4, tokens_per_image=4, image_size=56, image_token_id=4,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    trainer, bare, given = Trainer(config, topology, layout, 1), Bare(config), batches(config)

    def timed(step: Any) -> float:
        with Stopwatch() as watch:
            step()
        return watch.wall

    competitors = {
        "ours": lambda: timed(lambda: trainer.train_step(given, 0)),
        "bare Megatron-Core": lambda: timed(lambda: bare.step(given)),
    }
    for competitor in competitors.values():  # once unmeasured
        competitor()
    found = take_turns(competitors, chosen.rounds)
    ours, other = found["ours"], found["bare Megatron-Core"]
    finish(
        "step",
        (ours.median, "s a step"),
        (other.median, "s a step of bare Megatron-Core"),
        f"at most {TARGET}",
        ours.median <= TARGET * other.median,
        {"rounds": found},
        ["torch", "megatron-core"],
        chosen.smoke,
    )
    shut_down()


if __name__ == "__main__":
    main()
