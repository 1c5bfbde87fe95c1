"""200 steps by each FP8 recipe beside bf16: the same weights, data and rates; the loss at the end within 1%.

MM1-3B's widths in 4 decoder and 4 encoder layers, 2 sequences of 4096 a step, of captions, interleaved documents and
text in turn. Words follow each other by a table of chances that can be learnt (0.91 nats a word are left at best), so
that the loss falls from 11 to about 1 and a recipe that learns less well stands out.
"""

import functools
import statistics
from pathlib import Path
from typing import Any

from cases import Case, Ratio, run
from kit import Figures, has_gpu

STEPS, LAST = 200, 20
WORDS, CHANCES = 500, (0.7, 0.15, 0.1, 0.05)


def predictable(batch: Any, image_token: int, seed: int) -> Any:
    """The same batch with words that follow each other by the table; images stand where they stood."""
    import dataclasses

    import numpy as np
    import torch

    table = np.random.default_rng(0).integers(5, 5 + WORDS, (WORDS, len(CHANCES)))
    rng = np.random.default_rng(seed)
    rows, length = batch.tokens.shape
    turns = rng.choice(len(CHANCES), (length, rows), p=CHANCES)
    words = np.empty((length + 1, rows), dtype=np.int64)
    words[0] = rng.integers(5, 5 + WORDS, rows)
    for i in range(length):
        words[i + 1] = table[words[i] - 5, turns[i]]
    said = torch.from_numpy(words.T.copy()).to(batch.tokens.device)
    tokens = torch.where(batch.tokens == image_token, batch.tokens, said[:, :-1])
    labels = torch.where(batch.labels == image_token, batch.labels, said[:, 1:])
    return dataclasses.replace(batch, tokens=tokens, labels=labels)


def losses(experts: bool, scaling: str | None, vision: bool, smoke: bool) -> Figures:
    if scaling and not has_gpu():
        return {"skipped": "needs CUDA and Transformer Engine"}
    from workload import MIX, microbatch, recipe, trainer_of

    steps = 6 if smoke else STEPS
    overrides = [
        f"training.steps={steps}", "training.global_batch_size=2", "optimizer.lr=3e-4", "optimizer.warmup_steps=20"
    ]  # fmt: skip
    if not smoke:
        overrides += ["model.decoder.num_layers=4", "model.vision.num_layers=4"]
        overrides += ["model.decoder.moe.num_experts=8"] if experts else []
    if scaling:
        overrides += [f"training.fp8={scaling}", f"training.fp8_vision={str(vision).lower()}"]
    config = recipe("mm1-3b-moe" if experts else "mm1-3b", smoke, *overrides)
    kinds = [MIX[(7 * i) % len(MIX)] for i in range(2 * steps)]
    found = []
    with trainer_of(config) as trainer:
        token = trainer.layout.image_token_id
        for step in range(steps):
            numbers = (2 * step, 2 * step + 1)
            given = [predictable(microbatch(config, [kinds[n]], n)[0], token, n) for n in numbers]
            found.append(round(trainer.train_step(given, step).loss, 4))
            if step % 50 == 49:
                print(f"step {step + 1}: loss {found[-1]}", flush=True)
    return {"losses": found, "last": statistics.fmean(found[-LAST:])}


def ratios(found: dict[str, Figures], results: Path) -> list[Ratio]:
    lines = []
    for name, figures in found.items():
        plain = found.get("experts-bf16" if name.startswith("experts") else "bf16")
        if plain and not name.endswith("bf16"):
            ours, other = figures["last"], plain["last"]
            near = abs(ours / other - 1) <= 0.01
            lines.append(Ratio(f"loss, {name}", ours, "nats", other, "nats in bf16", "within 1%", near))
    return lines


CASES = [
    Case("bf16", functools.partial(losses, False, None, False)),
    Case("tensorwise", functools.partial(losses, False, "tensorwise", False)),
    Case("tensorwise-encoder-too", functools.partial(losses, False, "tensorwise", True)),
    Case("blockwise", functools.partial(losses, False, "blockwise", False)),
    Case("delayed", functools.partial(losses, False, "delayed", False)),
    Case("experts-bf16", functools.partial(losses, True, None, False)),
    Case("experts-tensorwise", functools.partial(losses, True, "tensorwise", False)),
    Case("experts-blockwise", functools.partial(losses, True, "blockwise", False)),
]

if __name__ == "__main__":
    run("fp8_loss", __doc__ or "", CASES, ratios)
