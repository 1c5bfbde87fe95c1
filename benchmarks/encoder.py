"""The encoder at two tensor-parallel ranks: whole on each with half of the images, or split over both with all of them.

Forward and backward of encoder and connector on the images of a microbatch, two processes with one thread each (gloo),
in turns; the slower rank counts. On a GPU messages cost less and idle kernels more: the ratio there is another one.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, Figure, Stopwatch, finish, options

from megatron_mm.config import RunConfig, config_from_dict
from megatron_mm.parallel.launch import launch
from megatron_mm.parallel.topology import initialize, shut_down

IMAGES = 8


def run_config(split: bool, smoke: bool) -> RunConfig:
    """A ViT-B-like encoder cut to 4 layers at 224 px; smoke: 2 layers of 64 at 56 px."""
    layers, width, heads, size = (2, 64, 2, 56) if smoke else (4, 768, 12, 224)
    return config_from_dict(
        {
            "run_dir": "unused",
            "model": {
                "vision": {
                    "num_layers": layers, "hidden_size": width, "num_attention_heads": heads,
                    "ffn_hidden_size": 4 * width, "patch_size": 14, "image_size": size,
                },
                "connector": {"num_tokens": 16, "hidden_size": width // 2, "depth": 1},
                "decoder": {
                    "num_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "num_query_groups": 2,
                    "ffn_hidden_size": 64, "vocab_size": 128,
                },
            },
            "data": {"tokenizer": "unused", "sources": [{"path": "unused", "weight": 1}], "seq_length": 512},
            "training": {"steps": 1, "global_batch_size": 1, "precision": "fp32"},
            "parallel": {"tensor_model_parallel_size": 2, "vision_tensor_parallel": split},
        }
    )  # fmt: skip


def rank() -> None:
    """One of two: prints the seconds of each round as JSON on rank 0."""
    rounds, smoke = int(sys.argv[2]), sys.argv[3] == "smoke"
    configs = {"images dealt": run_config(False, smoke), "encoder split": run_config(True, smoke)}
    initialize(configs["images dealt"], launch())
    import torch.distributed as dist

    from megatron_mm.model.build import build_model

    torch.set_num_threads(1)
    models = {name: build_model(config)[0] for name, config in configs.items()}
    size = configs["images dealt"].model.vision.image_size
    pixels = torch.randint(0, 256, (IMAGES, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def measured(name: str) -> float:
        mine = pixels if name == "encoder split" else pixels[dist.get_rank() :: 2]
        dist.barrier()
        with Stopwatch() as watch:
            models[name].encode_images(mine, IMAGES).square().sum().backward()
        slowest = torch.tensor(watch.wall)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    for name in models:  # once unmeasured
        measured(name)
    found = {name: [measured(name) for _ in range(1)] for name in models}
    for number in range(rounds - 1):
        for name in list(models)[:: 1 if number % 2 else -1]:
            found[name].append(measured(name))
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    shut_down()


def main() -> None:
    chosen = options(__doc__ or "", rounds=9)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = "smoke" if chosen.smoke else "full"
    command = [sys.executable, __file__, "--rank", str(chosen.rounds), size]
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for number in range(2):
            env = os.environ | {
                "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            with Path(folder, f"{number}.log").open("w") as log:
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        codes = [process.wait(600) for process in ranks]
        log_text = Path(folder, "0.log").read_text()
        if any(codes):
            sys.exit(f"error: a rank ended with {codes}\n{log_text}")
    found = {name: Figure(values) for name, values in json.loads(log_text.strip().splitlines()[-1]).items()}
    dealt, split = found["images dealt"], found["encoder split"]
    finish(
        "encoder",
        (dealt.median, f"s for {IMAGES} images dealt"),
        (split.median, "s with the encoder split"),
        "reported",
        True,
        {"rounds": found},
        ["torch", "megatron-core"],
        chosen.smoke,
    )


if __name__ == "__main__":
    rank() if sys.argv[1:2] == ["--rank"] else main()
