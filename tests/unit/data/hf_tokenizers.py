"""Small Hugging Face tokenizers of the families that teams start from, learnt from a few lines.

They are laid out as the families publish them: without `<image>`, and where the family has none, without bos or pad.
"""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FAMILIES = ("gpt2", "llama3", "qwen", "llama2", "metaspace")

# GPT-4's, as Llama 3 and Qwen have it: contractions, words, numbers, signs, spaces.
_WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)|\s+",
    )
)
_SPECIAL = {
    "gpt2": ["<|endoftext|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama2": ["<unk>", "<s>", "</s>"],
    "metaspace": ["<unk>", "<s>", "</s>"],
}
_NAMED: dict[str, dict[str, Any]] = {
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False},
    "llama2": {
        f"{name}_token": {"__type": "AddedToken", "content": token, "special": True}
        for name, token in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
    },
    "metaspace": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None},
}


def lines(count: int = 300) -> list[str]:
    rng = random.Random(0)
    words = (
        "red green blue circle square small large left right above it's 12 3456 (one) ein grüner Kreis двa 日本".split()
    )
    return [" ".join(rng.choices(words, k=8)) + ".\n" for _ in range(count)]


def write_tokenizer(folder: Path, family: str) -> Path:
    """A tokenizer's folder; its files' names and forms are those of the family."""
    special = _SPECIAL[family]
    tokenizer = Tokenizer(models.BPE())
    if family in ("llama2", "metaspace"):
        content = _with_byte_fallback(special, family)
    else:
        if family == "gpt2":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_WORDS), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        tokenizer.decoder = decoders.ByteLevel()
        if family == "qwen":
            tokenizer.normalizer = normalizers.NFC()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(lines(), trainer)
        tokenizer.add_special_tokens(special)  # after the vocabulary, as the families have them
        if family == "qwen":
            tokenizer.add_tokens(["<think>"])  # no special token: text is encoded to it
        if family == "llama3":
            bos = special[0]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
            )
            tokenizer.enable_truncation(8)  # some are saved so
        content = json.loads(tokenizer.to_str())
        content["model"]["ignore_merges"] = family == "llama3"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 100, **_NAMED[family]}
    if family == "qwen":
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in content["added_tokens"]
        }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _with_byte_fallback(special: list[str], family: str) -> dict[str, Any]:
    """As converted from SentencePiece: special tokens first, then bytes, then pieces with ▁ for a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(lines(), trainer)
    strip: list[Any] = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if family == "llama2":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *strip])
    content = json.loads(tokenizer.to_str())
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return content
