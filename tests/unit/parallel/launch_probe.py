"""One rank: says how it was started, then meets the others by torch's env:// and counts them."""

import dataclasses
import json
import os

from megatron_mm.parallel.launch import launch

said = dataclasses.asdict(launch())

import torch  # noqa: E402 (launch comes before anything heavy, as in the training command)
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(1)
dist.init_process_group("gloo")
ranks = torch.zeros(dist.get_world_size(), dtype=torch.int64)
ranks[dist.get_rank()] = 1
dist.all_reduce(ranks)
said |= {"met": ranks.tolist(), "node": os.environ.get("SLURMD_NODENAME"), "address": os.environ["MASTER_ADDR"]}
# One write, so that lines of several ranks do not mix.
os.write(1, (json.dumps(said) + "\n").encode())
dist.destroy_process_group()
