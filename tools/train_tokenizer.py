"""Learn a SentencePiece tokenizer from the text of JSONL files (captions, interleaved documents, text).

python tools/train_tokenizer.py --input captions.jsonl text.jsonl --output tokenizer.model --vocab-size 32000
"""

import argparse
from pathlib import Path

from megatron_mm.data.ingest.jsonl import read_texts
from megatron_mm.data.tokenizer import open_tokenizer, train_tokenizer
from megatron_mm.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.model")
    parser.add_argument("--vocab-size", type=int, required=True, help="all ids, 262 special and byte ids among them")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of lines when there are more than --max-lines"
    )
    parser.add_argument(
        "--max-lines", type=int, default=5_000_000, help="lines to learn from, at most (default: 5 million)"
    )
    args = parser.parse_args()
    train_tokenizer(read_texts(args.input), args.output, args.vocab_size, args.seed, args.max_lines)
    tokenizer = open_tokenizer(args.output)
    print(f"{args.output}: {tokenizer.vocab_size} ids, sha256 {tokenizer.hash[:12]}")


if __name__ == "__main__":
    run_cli(main)
