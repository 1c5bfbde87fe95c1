"""The main job end to end, with the tools that a user would call: data → tokenizer → sources → training on two ranks
→ kill and resume → export → few-shot evaluation → report.

    python examples/quickstart/run.py            (or: make quickstart)

Data is made once and reused; training starts anew each time. Everything lies in runs/quickstart/: data/, train/
(checkpoints, metrics.jsonl, tensorboard/), model/ (Hugging Face), scores.json, report.html.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil

from megatron_mm.config import RunConfig, load_config
from megatron_mm.errors import UserError, run_cli
from megatron_mm.evaluation.report import write_report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RANKS = 2
KINDS = {"captions": "caption", "interleaved": "interleaved", "text": "text"}  # source name → kind


class Scale(NamedTuple):
    """How much of everything; the smoke scale shows in a minute that every step works, and learns nothing."""

    pictures: int | None  # a split; None: all
    overrides: tuple[str, ...]
    questions: int
    few_shot_questions: int


FULL = Scale(None, (), questions=2000, few_shot_questions=500)
SMOKE = Scale(
    60,
    ("training.steps=12", "training.log_interval=1", "training.validation_interval=6", "training.validation_batches=1",
     "training.global_batch_size=4", "training.micro_batch_size=2", "checkpoint.interval=3",
     "model.vision.num_layers=1", "model.decoder.num_layers=1", "optimizer.warmup_steps=2",
     "data.validation_fraction=0.1"),
    questions=20,
    few_shot_questions=10,
)  # fmt: skip


class Quickstart:
    def __init__(self, output: Path, scale: Scale) -> None:
        self.output, self.scale = output, scale
        self.data, self.model = output / "data", output / "model"
        self.overrides = [
            *scale.overrides,
            f"run_dir={output / 'train'}",
            f"data.tokenizer={self.data / 'tokenizer.model'}",
            *(f"data.sources.{i}.path={self.data / name}" for i, name in enumerate(KINDS)),
        ]
        self.config: RunConfig = load_config(HERE / "config.yaml", self.overrides)
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        begun = time.monotonic()
        with self.stage("data: pictures and questions → JSONL → tokenizer → three sources"):
            self.make_data()
        with self.stage(f"training on {RANKS} ranks, killed after a checkpoint"):
            killed_at = self.train_until_killed()
        with self.stage(f"training resumed from step {killed_at}"):
            self.resume()
        with self.stage("export to Hugging Face format"):
            shutil.rmtree(self.model, ignore_errors=True)
            self.tool("convert_checkpoint.py", "to-hf", "--checkpoint", self.config.run_dir, "--output", self.model)
        with self.stage("few-shot evaluation with controls"):
            self.evaluate()
        scores = json.loads((self.output / "evaluation.json").read_text())
        scores |= {"seconds": round(time.monotonic() - begun, 1), "resumed_at_step": killed_at}
        (self.output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
        write_report(
            self.output / "report.html",
            title="megatron_mm quickstart",
            run_dir=Path(self.config.run_dir),
            scores=scores,
            records=self.output / "records.jsonl",
            facts=self.facts(scores["seconds"]),
        )
        self.say_scores(scores)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        number, start = len(self.seconds) + 1, time.monotonic()
        print(f"\n[{number}/5] {name}", flush=True)
        yield
        self.seconds[name] = time.monotonic() - start
        print(f"[{number}/5] done in {self.seconds[name]:.1f} s", flush=True)

    def make_data(self) -> None:
        """Skipped where an earlier call made the same: the recipe's hash is written last."""
        vocab_size = self.config.model.decoder.vocab_size
        recipe = hashlib.sha256((HERE / "prepare.py").read_bytes() + f"{self.scale.pictures} {vocab_size}".encode())
        stamp = self.data / "made-by"
        if stamp.exists() and stamp.read_text() == recipe.hexdigest():
            print(f"reusing {self.data}")
            return
        shutil.rmtree(self.data, ignore_errors=True)
        limit = [] if self.scale.pictures is None else ["--limit", self.scale.pictures]
        call(HERE / "prepare.py", "--output", self.data, *limit)
        tokenizer = self.config.data.tokenizer
        inputs = [self.data / f"{name}.jsonl" for name in KINDS]
        self.tool("train_tokenizer.py", "--input", *inputs, "--output", tokenizer, "--vocab-size", vocab_size)
        for name, kind in KINDS.items():
            self.tool(
                "preprocess_data.py", "--kind", kind, "--input", self.data / f"{name}.jsonl",
                "--output", self.data / name, "--tokenizer", tokenizer,
            )  # fmt: skip
        stamp.write_text(recipe.hexdigest())

    def train_until_killed(self) -> int:
        """Start afresh, SIGKILL every process once half the steps are in a checkpoint; answers with its step."""
        # Imported here: torch takes seconds, and a reader of --help should not wait for it.
        from megatron_mm.training.checkpoint_files import latest, step_of

        shutil.rmtree(self.config.run_dir, ignore_errors=True)
        checkpoints = Path(self.config.run_dir) / "checkpoints"
        training = self.start_training()
        while True:
            newest = latest(checkpoints)
            if newest and step_of(newest) * 2 >= self.config.training.steps:
                break
            if training.poll() is not None:
                raise UserError(
                    "training ended by itself", found=f"exit code {training.returncode}", do="see its output"
                )
            time.sleep(0.1)
        kill_tree(training)
        newest = latest(checkpoints)  # it may have written another one meanwhile
        assert newest is not None
        print(f"killed (SIGKILL) with a checkpoint at step {step_of(newest)}", flush=True)
        return step_of(newest)

    def resume(self) -> None:
        training = self.start_training()
        if training.wait():
            raise UserError("training failed", found=f"exit code {training.returncode}", do="see its output")
        lines = (Path(self.config.run_dir) / "metrics.jsonl").read_text().splitlines()
        steps = [metrics["step"] for metrics in map(json.loads, lines) if "loss" in metrics]
        interval, last = self.config.training.log_interval, self.config.training.steps
        if steps != [*range(interval, last, interval), last]:
            raise RuntimeError(f"metrics.jsonl does not hold every logged step once: {steps}")

    def start_training(self) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
            "-m", "megatron_mm.train", "--config", HERE / "config.yaml", *self.overrides,
        ]  # fmt: skip
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment())

    def evaluate(self) -> None:
        self.tool(
            "evaluate.py", "--model", self.model,
            "--train", self.data / "train_vqa.jsonl", "--test", self.data / "test_vqa.jsonl", "--shots", 0, 4, 8,
            "--limit", self.scale.questions, "--few-shot-limit", self.scale.few_shot_questions,
            "--output", self.output / "evaluation.json", "--records", self.output / "records.jsonl",
        )  # fmt: skip

    def tool(self, name: str, *arguments: object) -> None:
        call(ROOT / "tools" / name, *arguments)

    def facts(self, seconds: float) -> dict[str, str]:
        memory = psutil.virtual_memory().total
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
        return {
            "machine": f"{psutil.cpu_count()} cores, {memory / 2**30:.0f} GiB, {platform.platform()}",
            "versions": f"Python {platform.python_version()}, {packages}",
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "whole run": f"{seconds:.0f} s",
            **{name: f"{seconds:.0f} s" for name, seconds in self.seconds.items()},
        }

    def say_scores(self, scores: dict[str, object]) -> None:
        accuracy = scores["vqa_accuracy"]
        assert isinstance(accuracy, dict)
        print(f"\n{scores['n']} held-out questions:")
        for shots, value in accuracy.items():
            print(f"  {shots}-shot accuracy          {value:7.1%}")
        print(f"  control: shuffled images {scores['vqa_accuracy_shuffled']:7.1%}")
        print(f"  control: question only   {scores['vqa_accuracy_question_only']:7.1%}")
        print(f"{scores['seconds']} s in all, resumed at step {scores['resumed_at_step']}")
        print(f"report: {self.output / 'report.html'}", flush=True)


def environment() -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // RANKS)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def call(script: Path, *arguments: object) -> None:
    """Run a script to its end, its output shown as it comes."""
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=ROOT, env=environment())
    if done.returncode:
        raise UserError("a step failed", where=script.name, found=f"exit code {done.returncode}", do="see its output")


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all its descendants: what a power cut would do."""
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for everything")
    parser.add_argument("--smoke", action="store_true", help="a minute's run that learns nothing but takes every step")
    args = parser.parse_args()
    Quickstart(args.output.absolute(), SMOKE if args.smoke else FULL).run()


if __name__ == "__main__":
    run_cli(main)
