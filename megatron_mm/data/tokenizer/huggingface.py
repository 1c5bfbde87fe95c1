"""A Hugging Face tokenizer's folder (tokenizer.json, tokenizer_config.json), read without transformers.

bos, eos and pad are those that tokenizer_config.json names. Families that have no bos (Qwen) or no pad (Llama): their
eos stands in. Post-processor, truncation and padding of the file are left aside: a text's ids are the text's alone.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import tokenizers

from megatron_mm.data.tokenizer.interface import IMAGE_PIECE
from megatron_mm.errors import UserError

_UTF8_BYTES = [b for b in range(256) if b not in (0xC0, 0xC1) and b < 0xF5]  # the others are in no text
_HIGHEST_ID = 2**31 - 1  # sources hold int32
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SAVE_ANEW = "save it anew with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER)"


class HuggingFaceTokenizer:
    """Reads a folder.

    Raises:
        UserError: a file is missing or damaged; eos or `<image>` is missing; tokens are named that are not there or
            have two ids; not every text can be encoded, or some text would become a special id.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._file = str(Path(path) / "tokenizer.json")
        # One text at a time: a pool of threads would gain nothing, and not survive a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        content = read_json(self._file)
        self._tokenizer = parse(content, self._file)
        check_added(self._tokenizer, content, Path(path))
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if len(set(vocabulary.values())) < len(vocabulary) or self.vocab_size > _HIGHEST_ID:
            raise self._error("not a vocabulary", "two tokens of one id, or an id over 2^31", do="get the file anew")
        self._check_bytes(content)

        names = special_names(Path(path))
        special = {token["id"] for token in content.get("added_tokens") or [] if token["special"]}
        image = self._tokenizer.token_to_id(IMAGE_PIECE)
        if image is None or image not in special:
            raise self._error(
                "the tokenizer has no <image> id",
                None if image is None else f"{image}, but no special token",
                allowed="<image> among the special added tokens",
                do=f"python tools/adapt_tokenizer.py --from {self.path} --output …",
            )
        self.image_id = image
        self.eos_id = self._named("eos", names)
        self.bos_id = self._named("bos", names) if names["bos"] else self.eos_id
        self.pad_id = self._named("pad", names) if names["pad"] else self.eos_id
        if self.image_id in (self.bos_id, self.eos_id, self.pad_id):
            raise UserError(
                "<image> is also bos, eos or pad", where=str(Path(path) / "tokenizer_config.json"), found=self.image_id,
                allowed="a token of its own",
            )  # fmt: skip
        self.special_ids = frozenset(special | {self.bos_id, self.eos_id, self.pad_id})
        self.hash = _digest(content, [self.bos_id, self.eos_id, self.pad_id, self.image_id])
        # What a file or its config calls special is special, whatever the token's own flag.
        spelled = [self.piece(i) for i in sorted(self.special_ids)]
        self._tokenizer.add_special_tokens(spelled)
        self._tokenizer.encode_special_tokens = True  # as text
        self.encode("".join(f"a{token}b {token}\n{token}" for token in spelled))  # refuses a special id

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without bos and eos. Raises UnicodeEncodeError for text that UTF-8 cannot hold."""
        try:
            # `encode` would hold Python's lock.
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            text.encode()
            raise
        if not self.special_ids.isdisjoint(ids):
            raise self._error(
                "text becomes a special id", sorted(self.special_ids.intersection(ids)),
                allowed="a model that makes only ordinary pieces of text (any usual BPE)",
            )  # fmt: skip
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of the ids. Special ones, images among them, are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, number: int) -> str:
        """A token as the files spell it; empty where no token has the id."""
        return self._tokenizer.id_to_token(number) or ""

    def __reduce__(self) -> tuple[type["HuggingFaceTokenizer"], tuple[str]]:
        return type(self), (self.path,)  # the library's own pickle forgets `encode_special_tokens`

    def _error(self, what: str, found: object, allowed: str = "", do: str = "use another tokenizer") -> UserError:
        return UserError(what, where=self._file, found=found, allowed=allowed, do=do)

    def _named(self, name: str, names: dict[str, str | None]) -> int:
        token = names[name]
        number = None if token is None else self._tokenizer.token_to_id(token)
        if number is None:
            raise UserError(
                f"names no {name}_token" if token is None else f"names a {name}_token that is not in tokenizer.json",
                where=str(Path(self.path) / "tokenizer_config.json"), found=token, do=f'add "{name}_token": "…"',
            )  # fmt: skip
        return number

    def _check_bytes(self, content: dict[str, Any]) -> None:
        """Every text can be written: byte-level pieces, or byte fallback."""
        model = content["model"]
        if _holds_type(content.get("pre_tokenizer"), "ByteLevel") or _holds_type(
            content.get("normalizer"), "ByteLevel"
        ):
            kind, pieces = "byte-level", [_byte_letters()[b] for b in _UTF8_BYTES]
        else:
            kind, pieces = "byte fallback", [f"<0x{b:02X}>" for b in _UTF8_BYTES]
        missing = [piece for piece in pieces if self._tokenizer.token_to_id(piece) is None]
        if missing or (kind == "byte fallback" and not model.get("byte_fallback")) or model.get("dropout"):
            raise self._error(
                "the tokenizer cannot hold every text",
                f"{model.get('type')}, {kind} with {len(missing)} bytes missing"
                + (", dropout" if model.get("dropout") else ""),
                allowed="byte-level pieces, or byte fallback, with all bytes; no dropout",
            )


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file's object."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text)
        if _SURROGATE.search(text):  # JSON can spell a half of one, which is no text
            json.dumps(content, ensure_ascii=False).encode()
        if isinstance(content, dict):
            return content
        found: object = type(content).__name__
    except OSError as error:
        found = error.strerror
    except (ValueError, RecursionError) as error:
        found = error
    raise UserError(
        "cannot read the tokenizer", where=str(path), found=found, allowed="a JSON object",
        do="check the path; a Hugging Face tokenizer is a folder with tokenizer.json and tokenizer_config.json",
    )  # fmt: skip


def parse(content: dict[str, Any], where: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json's content, without truncation and padding."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content | {"truncation": None, "padding": None}))
    except Exception as error:  # the library raises no narrower one
        raise UserError(
            "not a tokenizer of the tokenizers library", where=where, found=error, do="get the file anew"
        ) from None
    return tokenizer


def check_added(tokenizer: tokenizers.Tokenizer, content: dict[str, Any], folder: Path) -> None:
    """The library gives added tokens the next free ids, whatever a file says; and transformers adds further ones."""
    stated = [("tokenizer.json", token["id"], token["content"]) for token in content.get("added_tokens") or []]
    config = "tokenizer_config.json"
    decoder = read_json(folder / config).get("added_tokens_decoder") or {}
    try:
        stated += [(config, int(number), str(token["content"])) for number, token in decoder.items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            "not added tokens", where=f"{folder / config}: added_tokens_decoder", do=_SAVE_ANEW
        ) from None  # fmt: skip
    for file, number, token in stated:
        if (actual := tokenizer.token_to_id(token)) != number:
            raise UserError(
                "the ids of added tokens disagree", where=str(folder / file),
                found=f"{token!r} is {number} here and {'missing' if actual is None else actual} in the vocabulary",
                allowed="ids that follow the vocabulary without holes", do=_SAVE_ANEW,
            )  # fmt: skip


def special_names(folder: Path) -> dict[str, str | None]:
    """bos, eos and pad by their text, from tokenizer_config.json, and in older folders special_tokens_map.json."""
    where = folder / "tokenizer_config.json"
    named = read_json(where)
    older = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in named and older.is_file():  # transformers' own rule
        named = named | read_json(older)
    names: dict[str, str | None] = {}
    for name in ("bos", "eos", "pad"):
        token = named.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise UserError("not a token", where=f"{where}: {name}_token", found=token, allowed="text")
        names[name] = token or None
    return names


def _byte_letters() -> list[str]:
    """GPT-2's letter of each byte: printable Latin-1 stands for itself, the rest follow from U+0100 on."""
    own = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    rest = iter(range(256, 512))
    return [chr(b if b in own else next(rest)) for b in range(256)]


def _holds_type(part: Any, name: str) -> bool:
    """Whether a normalizer or pre-tokenizer, or one of its sequence, is of this type."""
    if isinstance(part, dict):
        return part.get("type") == name or any(_holds_type(value, name) for value in part.values())
    return isinstance(part, list) and any(_holds_type(value, name) for value in part)


def _digest(content: dict[str, Any], ids: list[int]) -> str:
    """SHA-256 of what decides ids, the same however the file is laid out, and after transformers saves it anew."""
    model = {key: value for key, value in content["model"].items() if value is not None and value is not False}
    if "merges" in model:
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    deciding = {
        "model": model,
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
        "added_tokens": sorted(content.get("added_tokens") or [], key=lambda token: token["id"]),
        "ids": ids,
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
