"""Checkpoints to and from Hugging Face folders.

    python tools/convert_checkpoint.py to-hf   --checkpoint runs/x --output exported
    python tools/convert_checkpoint.py from-hf --model exported --config run.yaml --output init/step-00000000

`to-hf` takes a checkpoint's folder, or a run's folder and its newest checkpoint. `from-hf` writes a checkpoint at
step 0, without optimizer state, for a run whose config describes the same model.
"""

import argparse
from pathlib import Path

from megatron_mm.config import load_config
from megatron_mm.errors import run_cli


def to_hf(args: argparse.Namespace) -> None:
    from megatron_mm.hf.exporter import export

    checkpoint = export(args.checkpoint, args.output)
    print(f"{checkpoint} → {args.output}\nload it with: import megatron_mm.hf")


def from_hf(args: argparse.Namespace) -> None:
    from megatron_mm.data.tokenizer import find_tokenizer
    from megatron_mm.hf.importer import check_same_model, import_hf
    from megatron_mm.training.checkpoint_files import write_tensors

    config = load_config(args.config)
    check_same_model(args.model, config)
    write_tensors(args.output, config, import_hf(args.model), {"samples": 0}, find_tokenizer(args.model))
    print(f"{args.model} → {args.output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("to-hf", help="checkpoint → Hugging Face folder")
    export.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint's folder, or a run's")
    export.add_argument("--output", type=Path, required=True, help="folder to make")
    export.set_defaults(action=to_hf)
    import_ = commands.add_parser("from-hf", help="Hugging Face folder → checkpoint")
    import_.add_argument("--model", type=Path, required=True, help="a folder that to-hf made")
    import_.add_argument("--config", type=Path, required=True, help="the YAML of the run that will start from it")
    import_.add_argument("--output", type=Path, required=True, help="checkpoint folder to make")
    import_.set_defaults(action=from_hf)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    run_cli(main)
