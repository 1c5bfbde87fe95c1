"""A SentencePiece model with byte fallback, lossless on any text.

Ids of one that is trained here: `<pad>` 0, `<unk>` 1, `<s>` 2, `</s>` 3, `<image>` 4, newline 5, then the 256 bytes,
then learned BPE pieces. `<image>` is a control symbol: no text, not even "<image>", is ever encoded to it.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import sentencepiece

from megatron_mm.data.tokenizer.interface import IMAGE_PIECE
from megatron_mm.errors import UserError

_SPACE_MARK = "▁"  # SentencePiece writes spaces so; as a letter of the text it goes through byte fallback
_LINE_BYTES = 1 << 16  # of a training line; longer ones are cut
_NO_SPACE_BEFORE = b"\x1a\x02\x18\x00"  # normalizer_spec.add_dummy_prefix = false, appended to the message


class SentencePieceTokenizer:
    """Reads a SentencePiece `.model`.

    Raises:
        UserError: the file is missing or no SentencePiece model, or lacks bos, eos, pad, `<image>` or byte fallback.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        content, self._model = read_model(path)
        self.hash = hashlib.sha256(content).hexdigest()
        # Models of others may put a space before every text; what follows a space mark goes without it.
        self._inside = _load(content + _NO_SPACE_BEFORE, path)
        self.vocab_size: int = self._model.vocab_size()
        train, adapt = (
            "make one with tools/train_tokenizer.py",
            f"python tools/adapt_tokenizer.py --from {path} --output …",
        )
        self._space_mark = [
            self._id("byte", self._model.piece_to_id(f"<0x{b:02X}>"), train) for b in _SPACE_MARK.encode()
        ]
        self.eos_id = self._id("eos", self._model.eos_id(), train)
        self.bos_id = self._id("bos", self._model.bos_id(), adapt)
        self.pad_id = self._id("pad", self._model.pad_id(), adapt)
        image = self._model.piece_to_id(IMAGE_PIECE)
        self.image_id = self._id(IMAGE_PIECE, image if self._model.is_control(image) else -1, adapt)
        self.special_ids = frozenset(
            i for i in range(self.vocab_size) if self._model.is_control(i) or self._model.is_unknown(i)
        )

    def _id(self, name: str, number: int, do: str) -> int:
        if number < 0 or number == self._model.unk_id():
            raise UserError(
                f"the tokenizer has no {name} id", where=self.path,
                allowed="a SentencePiece model with pad, bos, eos, the control symbol <image> and byte fallback", do=do,
            )  # fmt: skip
        return number

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without bos and eos. Raises UnicodeEncodeError for text that UTF-8 cannot hold."""
        if _SPACE_MARK not in text:
            return self._model.encode(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE_MARK)):
            ids += self._space_mark if i else []
            ids += (self._inside if i else self._model).encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text; `decode(encode(t)) == t`. Control symbols, images among them, are left out."""
        return self._model.decode(ids)


def read_model(path: str | Path) -> tuple[bytes, sentencepiece.SentencePieceProcessor]:
    """A `.model` file's bytes, and the library's reader of them."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            "cannot read the tokenizer", where=str(path), found=error.strerror,
            do="check the path (--tokenizer, data.tokenizer), or make one with tools/train_tokenizer.py",
        ) from None  # fmt: skip
    return content, _load(content, path)


def _load(content: bytes, path: str | Path) -> sentencepiece.SentencePieceProcessor:
    with suppress(RuntimeError, ValueError, TypeError):
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        if content and 0 <= model.unk_id() < model.vocab_size():
            return model
    raise UserError(
        "not a SentencePiece model", where=str(path), found=f"{len(content)} bytes",
        allowed="a SentencePiece .model, or a folder with a Hugging Face tokenizer.json",
    )  # fmt: skip


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LINE_BYTES // 4):  # a character takes at most 4 bytes
                yield line[start : start + _LINE_BYTES // 4]


def train_tokenizer(
    texts: Iterable[str], output: str | Path, vocab_size: int, seed: int = 0, max_lines: int = 5_000_000
) -> None:
    """Learn BPE pieces from texts and write `output`, atomically.

    Args:
        vocab_size: of all ids, the 262 special, newline and byte ids included.
        seed: of the random choice among more than `max_lines` lines.
    Raises:
        UserError: there is no text, the vocabulary is too large or small for it, or the file cannot be written.
    """
    output = Path(output)
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=[IMAGE_PIECE],
            user_defined_symbols=["\n"],
            byte_fallback=True,
            character_coverage=0.99995,
            split_digits=True,
            # Lossless: the text is taken as it is, and encode(a) + encode(b) decodes to a + b.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=_LINE_BYTES,
            input_sentence_size=max_lines,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size) from None
    temporary = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(model.getvalue())
        temporary.replace(output)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError("cannot write the tokenizer", where=str(output), found=error.strerror) from None


def _explain(message: str, vocab_size: int) -> UserError:
    if high := re.search(r"value <= (\d+)", message):
        return UserError(
            "more pieces than this text holds", where="vocab_size", found=vocab_size, allowed=f"at most {high[1]}"
        )
    if low := re.search(r"\d+ vs (\d+)", message):
        return UserError(
            "fewer pieces than letters", where="vocab_size", found=vocab_size, allowed=f"at least {low[1]}"
        )
    if "sentences_.empty()" in message:
        return UserError("there is no text to learn from", where="input")
    return UserError("SentencePiece cannot learn from this text", where="input", found=message)
