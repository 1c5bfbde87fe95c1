"""What a person or a program sees of a run: console lines, metrics.jsonl, TensorBoard. On rank 0 alone."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from megatron_mm.config import RunConfig
from megatron_mm.training.step import StepResult


class Telemetry:
    """Writes one JSON line a logged step to RUN_DIR/metrics.jsonl, the same scalars to TensorBoard, and console lines.

    Losses are means over the text tokens of all steps since the last line, and rates are over the same steps: a source
    that comes in every other batch is seen whatever the interval. Gradient norm and learning rate are the last step's.
    The ETA is from the mean since the start, validation and checkpoints included.
    """

    def __init__(self, config: RunConfig, source_names: list[str], start_step: int, active: bool) -> None:
        self.config, self.source_names, self.active = config, source_names, active
        self.begun = self.last_time = time.perf_counter()
        self.start_step = self.last_step = start_step
        self._reset()
        if not active:
            return
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _forget_after(path, start_step)
        self.file = path.open("a", buffering=1)
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        except ImportError:
            self.say("TensorBoard is not installed (pip install 'megatron_mm[log]'): metrics.jsonl has everything")

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def step(self, step: int, result: StepResult, data_seconds: float) -> None:
        """After update number `step` (1-based)."""
        self.data_seconds += data_seconds
        self.positions += result.positions
        self.images += result.images
        self.padding += result.padding
        self.imbalance += result.image_imbalance
        for i, (loss, tokens) in enumerate(zip(result.source_losses, result.source_tokens, strict=True)):
            self.loss_sums[i] += loss * tokens
            self.text_tokens[i] += tokens
        total = self.config.training.steps
        if step % self.config.training.log_interval and step != total:
            return
        now = time.perf_counter()
        seconds, steps = now - self.last_time, step - self.last_step
        metrics: dict[str, float] = {"loss": sum(self.loss_sums) / max(1, sum(self.text_tokens))}
        for name, summed, tokens in zip(self.source_names, self.loss_sums, self.text_tokens, strict=True):
            if tokens:
                metrics[f"loss/{name}"] = summed / tokens
        metrics |= result.expert_losses
        metrics |= {
            "grad_norm": result.grad_norm,
            "lr": result.learning_rate,
            "tokens_per_s": self.positions / seconds,
            "images_per_s": self.images / seconds,
            "text_tokens": sum(self.text_tokens) / steps,
            "seconds_per_step": seconds / steps,
            "data_wait": self.data_seconds / seconds,
            "padding": self.padding / steps,
            "image_imbalance": self.imbalance / steps,
        }
        self.write(step, metrics)
        eta = (now - self.begun) / (step - self.start_step) * (total - step)
        by_source = ", ".join(f"{n} {metrics[f'loss/{n}']:.3f}" for n in self.source_names if f"loss/{n}" in metrics)
        self.say(
            f"step {step:>{len(str(total))}}/{total} | loss {metrics['loss']:.4f} ({by_source}) "
            f"| lr {result.learning_rate:.2e} | grad {result.grad_norm:.3f} "
            f"| {_rate(metrics['tokens_per_s'])} tokens/s | {_rate(metrics['images_per_s'])} images/s "
            f"| ETA {_clock(eta)}"
        )
        self.last_time, self.last_step = now, step
        self._reset()

    def _reset(self) -> None:
        """Begin an interval between two lines."""
        self.data_seconds, self.positions, self.images = 0.0, 0, 0
        self.padding = self.imbalance = 0.0
        self.loss_sums, self.text_tokens = [0.0] * len(self.source_names), [0] * len(self.source_names)

    def validation(self, step: int, losses: dict[str, float]) -> None:
        """Held-out loss a source after update number `step`."""
        self.write(step, {f"validation/{name}": loss for name, loss in losses.items()})
        self.say(f"step {step} | validation " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if not self.active:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.active:
            self.file.close()
            if self.board is not None:
                self.board.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop lines of steps that will be done again, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _rate(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
