"""Make an open model's tokenizer ready for pictures: add `<image>`, and pad and bos where it has none.

    python tools/adapt_tokenizer.py --from llama/ --output data/tokenizer               a Hugging Face folder
    python tools/adapt_tokenizer.py --from mistral.model --output data/tokenizer.model  a SentencePiece model

New ids follow the old ones, which stay as they were: the model's embeddings keep their rows and gain one for each new
id. A family without bos (Qwen) starts its documents with eos, and gets no new token for it.
"""

import argparse
from pathlib import Path

from megatron_mm.data.tokenizer import open_tokenizer
from megatron_mm.data.tokenizer.adapt import adapt_tokenizer
from megatron_mm.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=Path, required=True, dest="source", metavar="PATH", help="folder or .model file")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="folder or .model file to make")
    args = parser.parse_args()
    added = adapt_tokenizer(args.source, args.output)
    tokenizer = open_tokenizer(args.output)
    print(
        f"{args.output}: {tokenizer.vocab_size} ids, sha256 {tokenizer.hash[:12]}; added: {', '.join(added) or 'none'}"
    )
    print(
        f"  <image> {tokenizer.image_id}, bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, pad {tokenizer.pad_id}; "
        f"set model.decoder.vocab_size to {tokenizer.vocab_size} or more"
    )


if __name__ == "__main__":
    run_cli(main)
