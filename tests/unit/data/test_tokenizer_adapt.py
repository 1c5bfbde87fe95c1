"""An open model's tokenizer gains `<image>` and pad, and keeps every id."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_mm.data.tokenizer import open_tokenizer, train_tokenizer
from megatron_mm.data.tokenizer.adapt import adapt_tokenizer
from megatron_mm.errors import UserError
from tests.unit.data.hf_tokenizers import FAMILIES, lines, write_tokenizer

ROOT = Path(__file__).resolve().parents[3]
TEXTS = [*lines(20), "a <image> b<pad>", "</s><s> <|im_end|>", " x", "é e\u0301 日本 😀\n\n", "a▁b ▁", ""]


def llama_model(path: Path, **options: object) -> Path:
    """A SentencePiece model as Llama and Mistral have it: a space before every text, no pad."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines()), model_writer=file, model_type="bpe", minloglevel=2,
            **{"vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity",
               "remove_extra_whitespaces": False} | options,
        )  # fmt: skip
    return path


def test_a_model_grows_at_its_end(tmp_path):
    source = llama_model(tmp_path / "llama.model")
    with pytest.raises(UserError, match=r"no pad id[^$]*adapt_tokenizer.py --from"):
        open_tokenizer(source)
    assert adapt_tokenizer(source, tmp_path / "new.model") == ["<image>", "<pad>"]
    assert (tmp_path / "new.model").read_bytes().startswith(source.read_bytes())
    before = sentencepiece.SentencePieceProcessor(model_file=str(source))
    tokenizer = open_tokenizer(tmp_path / "new.model")
    assert (tokenizer.vocab_size, tokenizer.image_id, tokenizer.pad_id) == (402, 400, 401)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (before.bos_id(), before.eos_id())
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not tokenizer.special_ids & set(ids)
        if "▁" not in text:
            assert ids == before.encode(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama.model", "new.model"]


def test_a_model_without_bos(tmp_path):
    adapt_tokenizer(llama_model(tmp_path / "t.model", bos_id=-1, unk_id=1, eos_id=2, pad_id=0), tmp_path / "new.model")
    tokenizer = open_tokenizer(tmp_path / "new.model")
    assert (tokenizer.image_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id) == (400, 401, 0, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gains_tokens_and_changes_nothing_else(family, tmp_path):
    source = write_tokenizer(tmp_path / "raw", family)
    with pytest.raises(UserError, match=r"no <image> id[^$]*adapt_tokenizer.py --from"):
        open_tokenizer(source)
    new = adapt_tokenizer(source, tmp_path / "new")
    assert new == (["<image>"] if family == "qwen" else ["<image>", "<pad>"])
    before, after = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("raw", "new"))
    added = [after["added_tokens"].pop() for _ in new][::-1]
    assert after == before
    oracle = AutoTokenizer.from_pretrained(source)
    assert [(token["content"], token["id"], token["special"]) for token in added] == [
        (piece, len(oracle) + i, True) for i, piece in enumerate(new)
    ]
    tokenizer = open_tokenizer(tmp_path / "new")
    for text in TEXTS:
        wanted = oracle(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode(text) == wanted
    config, old = (json.loads((tmp_path / n / "tokenizer_config.json").read_text()) for n in ("new", "raw"))
    changed = {key for key in config.keys() | old.keys() if config.get(key) != old.get(key)}
    assert changed <= {"bos_token", "pad_token", "added_tokens_decoder"}
    # transformers reads it alike
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size,
    )  # fmt: skip


def test_an_older_folder(tmp_path):
    """Names in special_tokens_map.json are kept, and completed, there."""
    source = write_tokenizer(tmp_path / "raw", "llama2")
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": None}))
    adapt_tokenizer(source, tmp_path / "new")
    assert json.loads((tmp_path / "new/special_tokens_map.json").read_text())["pad_token"] == "<pad>"
    assert open_tokenizer(tmp_path / "new").pad_id == AutoTokenizer.from_pretrained(tmp_path / "new").pad_token_id


def test_what_cannot_be_adapted(tmp_path, tokenizer):
    def refused(source, told, output="new"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=told):
            adapt_tokenizer(source, tmp_path / output)
        assert sorted(tmp_path.rglob("*")) == before

    adapted = tmp_path / "adapted"
    adapt_tokenizer(write_tokenizer(tmp_path / "gpt2", "gpt2"), adapted)
    refused(tmp_path / "gpt2", "already there", "adapted")
    refused(adapted, "nothing to add")
    refused(tokenizer.path, "nothing to add")
    refused(tmp_path / "nowhere", "cannot read the tokenizer")
    refused(adapted / "tokenizer.json", "not a SentencePiece model")
    refused(tmp_path, "tokenizer.json: cannot read the tokenizer")
    refused(llama_model(tmp_path / "t.model", byte_fallback=False, vocab_size=100), "no byte id")
    refused(llama_model(tmp_path / "u.model", user_defined_symbols=["<image>"]), "<image> is no control symbol")

    lossy = write_tokenizer(tmp_path / "lossy", "llama2")
    content = json.loads((lossy / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = False
    (lossy / "tokenizer.json").write_text(json.dumps(content))
    refused(lossy, r"lossy: the tokenizer cannot be adapted[^$]*cannot hold every text")

    holes = write_tokenizer(tmp_path / "holes", "llama2")
    content = json.loads((holes / "tokenizer.json").read_text())
    size = len(content["model"]["vocab"])
    content["model"]["vocab"] |= {"@": size + 1}  # as many entries as the first new id would be, that id taken
    (holes / "tokenizer.json").write_text(json.dumps(content))
    refused(holes, "vocabulary has holes")


def test_the_command(tmp_path):
    source = write_tokenizer(tmp_path / "raw", "qwen")
    command = [sys.executable, "tools/adapt_tokenizer.py", "--from", str(source), "--output", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tokenizer = open_tokenizer(tmp_path / "new")
    assert f"{tokenizer.vocab_size} ids" in done.stdout
    assert f"<image> {tokenizer.image_id}, bos {tokenizer.eos_id}, eos {tokenizer.eos_id}" in done.stdout
    train_tokenizer(lines(), tmp_path / "whole.model", 400)
    command[3], command[5] = str(tmp_path / "whole.model"), str(tmp_path / "other.model")
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "nothing to add" in done.stderr
