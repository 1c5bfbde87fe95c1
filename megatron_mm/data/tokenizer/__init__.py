"""The run's tokenizer: a SentencePiece `.model`, or a Hugging Face tokenizer's folder.

tokenizer = open_tokenizer("data/tokenizer.model")     # made by tools/train_tokenizer.py
tokenizer = open_tokenizer("llama-3-with-image")       # made by tools/adapt_tokenizer.py from an open model's
"""

from pathlib import Path

from megatron_mm.data.tokenizer.files import copy_tokenizer, find_tokenizer
from megatron_mm.data.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_mm.data.tokenizer.interface import IMAGE_PIECE, Tokenizer
from megatron_mm.data.tokenizer.sentencepiece import SentencePieceTokenizer, train_tokenizer

__all__ = [
    "IMAGE_PIECE",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "copy_tokenizer",
    "find_tokenizer",
    "open_tokenizer",
    "train_tokenizer",
]


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `.model` file or in a folder with a tokenizer.json.

    Raises:
        UserError: it is missing or damaged, or cannot serve here; the error says what to do.
    """
    return HuggingFaceTokenizer(path) if Path(path).is_dir() else SentencePieceTokenizer(path)
