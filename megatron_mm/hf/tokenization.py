"""The run's tokenizer as a transformers tokenizer, with the ids of training on any text.

A SentencePiece model is called as it was for the training data: a conversion to the library's Rust tokenizers would be
faster, and equal on most texts only. A Hugging Face tokenizer goes out as its own files, and the library's own class
reads them.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_mm.data.tokenizer import IMAGE_PIECE, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer


def exported_tokenizer(trained: Tokenizer) -> PreTrainedTokenizerBase:
    """What stands in an exported folder for the run's tokenizer.

    Called with a text, it gives bos and the ids of training; no text becomes a special token. `<image>` becomes the
    image id through the processor. Batches are padded on the left, for generation.
    """
    if not isinstance(trained, HuggingFaceTokenizer):
        return MegatronMMTokenizer(trained.path)
    bos, eos, pad = (trained.piece(i) for i in (trained.bos_id, trained.eos_id, trained.pad_id))
    backend = Backend.from_file(str(Path(trained.path) / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, trained.bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens={"image_token": IMAGE_PIECE},
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


class MegatronMMTokenizer(PreTrainedTokenizer):
    """[bos] + the training tokenizer's ids, where `<image>` in the text becomes the image id.

    No other text becomes a special token: `</s>` typed by a user stays text, as in training. Batches are padded on
    the left, for generation.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 (as in the base class)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self.trained = SentencePieceTokenizer(vocab_file)
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        for name in ("bos", "eos", "pad", "unk"):
            kwargs[f"{name}_token"] = self.sp_model.id_to_piece(getattr(self.sp_model, f"{name}_id")())
        kwargs["extra_special_tokens"] = {"image_token": IMAGE_PIECE}
        super().__init__(**kwargs)
        self.image_token, self.image_token_id = IMAGE_PIECE, self.trained.image_id

    @property
    def vocab_size(self) -> int:
        return self.trained.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {self.sp_model.id_to_piece(i): i for i in range(self.vocab_size)}

    def tokenize(self, text: str, split_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Pieces of the text. With `split_special_tokens` even `<image>` is text."""
        ids: list[int] = []
        for i, part in enumerate([text] if split_special_tokens else text.split(IMAGE_PIECE)):
            ids += [self.image_token_id] * (i > 0) + self.trained.encode(part)
        return [self.sp_model.id_to_piece(i) for i in ids]

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        # Ids between the tokenizer's size and the model's (padded) one have no piece.
        return self.sp_model.id_to_piece(index) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of the pieces; special tokens among them are spelled out."""
        text: list[str] = []
        run: list[int] = []
        for piece in tokens:
            number = self.sp_model.piece_to_id(piece)
            if self.sp_model.is_control(number):
                text += [self.trained.decode(run), piece]
                run = []
            elif piece:
                run.append(number)
        return "".join([*text, self.trained.decode(run)])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(i in self.all_special_ids) for i in token_ids_0]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        if os.path.abspath(self.vocab_file) != os.path.abspath(target):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
