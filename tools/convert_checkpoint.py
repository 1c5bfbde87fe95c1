"""Checkpoints to and from Hugging Face folders, and dense ones into ones with experts.

    python tools/convert_checkpoint.py to-hf   --checkpoint runs/x --output exported
    python tools/convert_checkpoint.py from-hf --model exported --config run.yaml --output init/model
    python tools/convert_checkpoint.py upcycle --checkpoint runs/x --config moe.yaml --output init/moe

`to-hf` takes a checkpoint's folder, or a run's folder and its newest checkpoint. `from-hf` writes a checkpoint at
step 0, without optimizer state, for a run whose config describes the same model, at any resolution: from a folder that
`to-hf` made, or from open weights of an encoder (CLIP, SigLIP, DINOv2) or of a decoder (Llama, Mistral, Qwen3,
Qwen3-MoE, Mixtral). `upcycle` copies each FFN of a dense checkpoint into all experts of its layer. Runs start from such
checkpoints by `checkpoint.init_from`; several may be named, an encoder's and a decoder's for instance.
"""

import argparse
import math
from pathlib import Path

from megatron_mm.config import load_config
from megatron_mm.errors import UserError, run_cli


def to_hf(args: argparse.Namespace) -> None:
    from megatron_mm.hf.exporter import export

    checkpoint = export(args.checkpoint, args.output)
    print(f"{checkpoint} → {args.output}\nload it with: import megatron_mm.hf")


def from_hf(args: argparse.Namespace) -> None:
    from megatron_mm.data.tokenizer import find_tokenizer
    from megatron_mm.hf.importer import check_same_model, import_hf, is_export, read_config
    from megatron_mm.hf.pretrained import import_pretrained
    from megatron_mm.training.checkpoint_files import write_tensors

    config = load_config(args.config)
    if not is_export(args.model):
        write_tensors(args.output, config, import_pretrained(args.model, config.model), {"samples": 0})
        print(f"{args.model} → {args.output}")
        return
    check_same_model(args.model, config)
    grids = [read_config(args.model).grid, config.model.vision.grid]
    tensors = import_hf(args.model, config.model.vision)
    write_tensors(args.output, config, tensors, {"samples": 0}, find_tokenizer(args.model))
    note = "; positions interpolated from a grid of {0} × {0} to {1} × {1}".format(*grids)
    print(f"{args.model} → {args.output}{note if grids[0] != grids[1] else ''}")


def upcycle(args: argparse.Namespace) -> None:
    from megatron_mm.hf.exporter import find_checkpoint
    from megatron_mm.training.checkpoint_files import CheckpointReader, write_tensors
    from megatron_mm.training.upcycling import check_upcycling
    from megatron_mm.training.upcycling import upcycle as experts_of

    if not 0 <= args.noise < math.inf:  # nor nan
        raise UserError("out of range", where="--noise", found=args.noise, allowed="0 or more")
    checkpoint = find_checkpoint(args.checkpoint)
    reader, config = CheckpointReader(checkpoint), load_config(args.config)
    check_upcycling(reader.config, config, args.optimizer)
    write_tensors(
        args.output,
        config,
        experts_of(reader, config, args.noise, args.optimizer),
        reader.extra,
        tokenizer=checkpoint / reader.extra["tokenizer"] if "tokenizer" in reader.extra else None,
        step=reader.step if args.optimizer else 0,
    )
    print(f"{checkpoint} → {args.output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("to-hf", help="checkpoint → Hugging Face folder")
    export.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint's folder, or a run's")
    export.add_argument("--output", type=Path, required=True, help="folder to make")
    export.set_defaults(action=to_hf)
    import_ = commands.add_parser("from-hf", help="Hugging Face folder → checkpoint")
    import_.add_argument("--model", type=Path, required=True, help="a folder that to-hf made, or open weights")
    import_.add_argument("--config", type=Path, required=True, help="the YAML of the run that will start from it")
    import_.add_argument("--output", type=Path, required=True, help="checkpoint folder to make")
    import_.set_defaults(action=from_hf)
    sparse = commands.add_parser("upcycle", help="dense checkpoint → checkpoint with experts")
    sparse.add_argument("--checkpoint", type=Path, required=True, help="a dense checkpoint's folder, or a run's")
    sparse.add_argument("--config", type=Path, required=True, help="the YAML of the run with experts")
    sparse.add_argument("--output", type=Path, required=True, help="checkpoint folder to make")
    sparse.add_argument("--noise", type=float, default=0.0, help="in each copy, as a share of its spread (default 0)")
    sparse.add_argument(
        "--optimizer",
        action="store_true",
        help="carry step and optimizer state: written to RUN_DIR/checkpoints/step-NNNNNNNN, the run goes on from it",
    )
    sparse.set_defaults(action=upcycle)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    run_cli(main)
