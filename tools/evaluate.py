"""Few-shot VQA accuracy of an exported model, with its controls.

    python tools/evaluate.py --model exported --train train_vqa.jsonl --test test_vqa.jsonl --shots 0 4 8 \
        --limit 2000 --few-shot-limit 500 --output scores.json --records records.jsonl
"""

import argparse
import json
import os
import time
from pathlib import Path

from megatron_mm.errors import run_cli


class ProgressLine:
    """Prints a stage's progress every few seconds and when it is done."""

    def __init__(self, interval: float = 5.0) -> None:
        self.interval = interval
        self.stage, self.started, self.printed = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.started, self.printed = stage, self.printed or now, now
        if done == total or now - self.printed >= self.interval:
            self.printed = now
            elapsed = now - self.started
            left = elapsed / done * (total - done)
            print(f"{stage}: {done}/{total} questions in {elapsed:.0f} s, {left:.0f} s left", flush=True)


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that convert_checkpoint.py to-hf made")
    parser.add_argument("--train", type=Path, required=True, help="JSONL of demonstrations")
    parser.add_argument("--test", type=Path, required=True, help="JSONL of questions")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4, 8], help="numbers of demonstrations")
    parser.add_argument("--limit", type=int, help="test questions, drawn at random (default: all)")
    parser.add_argument("--few-shot-limit", type=int, help="of these, how many with demonstrations (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the sample, the demonstrations and the shuffled images")
    parser.add_argument("--output", type=Path, required=True, help="JSON of scores")
    parser.add_argument("--records", type=Path, help="JSONL of every question with the model's answer")
    args = parser.parse_args()

    from megatron_mm.evaluation.vqa import evaluate_vqa, load_generator

    result = evaluate_vqa(
        load_generator(args.model, batch_size=args.batch_size),
        args.train,
        args.test,
        args.shots,
        args.limit,
        args.few_shot_limit,
        args.seed,
        progress=ProgressLine(),
    )
    if args.records:
        write_atomically(args.records, "".join(json.dumps(record) + "\n" for record in result.records))
    write_atomically(args.output, json.dumps(result.scores, indent=2) + "\n")
    print(json.dumps(result.scores, indent=2))


if __name__ == "__main__":
    run_cli(main)
