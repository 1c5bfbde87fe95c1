"""An open model's tokenizer with what this stack needs added: `<image>`, and pad and bos where it has none.

New ids follow the old ones; every old id, and so the ids of every text, stay as they were.
"""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from megatron_mm.data.tokenizer.files import HUGGING_FACE_FILES
from megatron_mm.data.tokenizer.huggingface import HuggingFaceTokenizer, check_added, parse, read_json, special_names
from megatron_mm.data.tokenizer.interface import IMAGE_PIECE
from megatron_mm.data.tokenizer.sentencepiece import SentencePieceTokenizer, read_model
from megatron_mm.errors import UserError

PAD_PIECE, BOS_PIECE = "<pad>", "<s>"


def adapt_tokenizer(source: str | Path, output: str | Path) -> list[str]:
    """Write an adapted copy of a `.model` file, or of a Hugging Face tokenizer's folder; answers with the new tokens.

    Raises:
        UserError: `output` exists or cannot be written; `source` is damaged, lacks nothing, or lacks what cannot be
            added.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise UserError("already there", where=str(output), do="remove it, or name another")
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        added = (_adapt_folder if source.is_dir() else _adapt_model)(source, temporary)
        _check(source, temporary)
        os.replace(temporary, output)
    except OSError as error:
        raise UserError("cannot write the tokenizer", where=str(output), found=error.strerror) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return added


def _check(source: Path, adapted: Path) -> None:
    try:
        _ = HuggingFaceTokenizer(adapted) if adapted.is_dir() else SentencePieceTokenizer(adapted)
    except UserError as error:
        raise UserError(
            "the tokenizer cannot be adapted", where=str(source), found=f"{error.what}: {error.found}",
            allowed=error.allowed, do="use another tokenizer",
        ) from None  # fmt: skip


def _nothing_to_add(source: Path) -> UserError:
    return UserError("nothing to add", where=str(source), found="<image>, bos and pad", do="use it as it is")


def _adapt_model(source: Path, output: Path) -> list[str]:
    """A protobuf message grows by appending to its file: the old file is the new one's beginning."""
    content, model = read_model(source)
    added = [piece for piece, missing in (
        (IMAGE_PIECE, not model.is_control(model.piece_to_id(IMAGE_PIECE))),
        (BOS_PIECE, model.bos_id() < 0),
        (PAD_PIECE, model.pad_id() < 0),
    ) if missing]  # fmt: skip
    if not added:
        raise _nothing_to_add(source)
    for piece in added:
        if model.piece_to_id(piece) != model.unk_id():
            raise UserError(
                "the tokenizer cannot be adapted", where=str(source), found=f"{piece} is no control symbol in it",
                do="use another tokenizer",
            )  # fmt: skip
    output.write_bytes(content + b"".join(map(_control_piece, added)))
    return added


def _control_piece(piece: str) -> bytes:
    """One more of ModelProto.pieces: piece, score 0, type CONTROL."""
    text = piece.encode()
    message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x03"
    return b"\x0a" + bytes([len(message)]) + message


def _adapt_folder(source: Path, output: Path) -> list[str]:
    """bos is eos where there is none, as in reading; a pad of its own keeps eos out of later fine-tuning's padding."""
    content, names = read_json(source / "tokenizer.json"), special_names(source)
    tokenizer = parse(content, str(source / "tokenizer.json"))
    check_added(tokenizer, content, source)
    before = tokenizer.get_vocab(with_added_tokens=True)
    entries = {token["content"]: token for token in content.get("added_tokens") or []}
    wanted = [IMAGE_PIECE, *([] if names["pad"] else [PAD_PIECE])]
    added = [piece for piece in wanted if piece not in entries or not entries[piece]["special"]]
    config = {"bos_token": names["bos"] or names["eos"], "pad_token": names["pad"] or PAD_PIECE}
    if not added and names["bos"] and names["pad"]:
        raise _nothing_to_add(source)

    tokenizer.add_special_tokens(added)
    for piece in added:
        number = tokenizer.token_to_id(piece)
        if piece not in before and number in before.values():
            raise UserError(
                "the vocabulary has holes: a new token would get an old one's id", where=str(source),
                found=f"{piece} {number}", allowed="ids without holes", do="use another tokenizer",
            )  # fmt: skip
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        entries[piece] = {"id": number, "content": piece, **flags, "special": True}
    content["added_tokens"] = sorted(entries.values(), key=lambda token: token["id"])

    output.mkdir()
    for name in HUGGING_FACE_FILES:
        if not (source / name).is_file():
            continue
        data: dict[str, Any] = content if name == "tokenizer.json" else read_json(source / name) | config
        if data.get("added_tokens_decoder"):
            for piece in added:
                entry = {key: value for key, value in entries[piece].items() if key != "id"}
                data["added_tokens_decoder"][str(entries[piece]["id"])] = entry
        (output / name).write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return added
