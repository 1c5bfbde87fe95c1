"""Hugging Face tokenizers: the ids that transformers gives, and no special one from any text."""

import json
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_mm.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mm.data.tokenizer.adapt import adapt_tokenizer
from megatron_mm.errors import UserError
from tests.unit.data.hf_tokenizers import FAMILIES, lines, write_tokenizer

LOSSLESS = ("gpt2", "llama3", "llama2")  # Qwen composes accents, Metaspace takes a space before the text away
SPELLED = ["<image>", "<s>", "</s>", "<pad>", "<unk>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*SPELLED, "<think>", " ", "\n", "red", "it's", "é", "e\u0301", "日", "<0x41>", "12", "\0", "😀"])
).map("".join)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The families' tokenizers with what this stack adds."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        adapt_tokenizer(write_tokenizer(root / "raw" / family, family), root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[str, Tokenizer, Path]:
    return request.param, open_tokenizer(folders[request.param]), folders[request.param]


def edit(folder: Path, name: str, change) -> Path:
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_ids_are_those_of_transformers(family):
    name, tokenizer, folder = family
    oracle = AutoTokenizer.from_pretrained(folder)

    @settings(max_examples=200)
    @given(TEXTS)
    def check(text):
        ids = tokenizer.encode(text)
        assert ids == oracle(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert not tokenizer.special_ids & set(ids)
        if name in LOSSLESS:
            assert tokenizer.decode(ids) == text

    check()
    for text in lines():
        assert tokenizer.encode(text) == oracle(text, add_special_tokens=False)["input_ids"]


def test_a_text_is_neither_cut_nor_padded(folders, tmp_path):
    padding = {"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>"}
    folder = edit(copy(folders["llama3"], tmp_path / "t"), "tokenizer.json", lambda c: c.update(padding=padding))
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"]["max_length"] == 8
    tokenizer, text = open_tokenizer(folder), "".join(lines())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("red")) <= 3


def test_special_ids(family):
    name, tokenizer, folder = family
    oracle = AutoTokenizer.from_pretrained(folder)
    spelled = {i: oracle.convert_ids_to_tokens(i) for i in range(tokenizer.vocab_size)}
    assert spelled[tokenizer.image_id] == "<image>"
    assert tokenizer.eos_id == oracle.eos_token_id
    # Without a bos of its own, a family's documents start with eos.
    assert tokenizer.bos_id == oracle.bos_token_id
    assert (tokenizer.bos_id == tokenizer.eos_id) == (name in ("gpt2", "qwen"))
    assert spelled[tokenizer.pad_id] == ("<|endoftext|>" if name == "qwen" else "<pad>")
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.special_ids == {i for i, token in oracle.added_tokens_decoder.items() if token.special}


def test_a_missing_pad_is_eos(folders, tmp_path):
    folder = edit(copy(folders["llama3"], tmp_path / "t"), "tokenizer_config.json", lambda c: c.pop("pad_token"))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.pad_id == tokenizer.eos_id != tokenizer.bos_id


def test_names_of_older_folders(folders, tmp_path):
    """special_tokens_map.json goes before tokenizer_config.json where the latter lists no added tokens."""
    folder = copy(folders["llama2"], tmp_path / "t")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<pad>", "lstrip": False}}))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.eos_id == AutoTokenizer.from_pretrained(folder).eos_token_id == tokenizer.pad_id


def test_an_ordinary_added_token_that_is_named_becomes_special(folders, tmp_path):
    folder = copy(folders["qwen"], tmp_path / "t")
    edit(folder, "tokenizer_config.json", lambda c: c.update(eos_token="<think>"))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.eos_id not in tokenizer.encode("a<think>b")
    assert tokenizer.decode(tokenizer.encode("a<think>b")) == "a<think>b"


def test_text_that_utf8_cannot_hold(family):
    with pytest.raises(UnicodeEncodeError):
        family[1].encode("a\ud800")


def _encode(pair: tuple[Tokenizer, str]) -> list[int]:
    return pair[0].encode(pair[1])


def test_threads_and_processes(family):
    _, tokenizer, _ = family
    texts = [*lines(), "a<image>b</s>"]
    wanted = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, texts * 4)) == wanted * 4
    assert _encode((pickle.loads(pickle.dumps(tokenizer)), texts[-1])) == wanted[-1]  # noqa: S301 (our own)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(tokenizer.encode, texts).get(timeout=180) == wanted


def test_the_hash_is_that_of_the_content(folders, tmp_path):
    tokenizer = open_tokenizer(folders["llama3"])
    same = copy(folders["llama3"], tmp_path / "same")

    # As versions of the library before 0.20 wrote it, and in another order.
    edit(same, "tokenizer.json", lambda c: c["model"].pop("fuse_unk"))
    content = json.loads((same / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["post_processor"] = None
    (same / "tokenizer.json").write_text(json.dumps(dict(reversed(content.items())), indent=1))
    assert open_tokenizer(same).hash == tokenizer.hash
    AutoTokenizer.from_pretrained(folders["llama3"]).save_pretrained(tmp_path / "again")
    assert open_tokenizer(tmp_path / "again").hash == tokenizer.hash

    for name, change in (
        ("tokenizer.json", lambda c: c["model"]["merges"].pop()),
        ("tokenizer.json", lambda c: c["model"].update(ignore_merges=False)),
        ("tokenizer.json", lambda c: c.update(normalizer={"type": "NFC"})),
        ("tokenizer_config.json", lambda c: c.update(bos_token="<|eot_id|>")),
    ):
        other = edit(copy(folders["llama3"], tmp_path / str(len(list(tmp_path.iterdir())))), name, change)
        assert open_tokenizer(other).hash != tokenizer.hash


def rename(vocab: dict[str, int], piece: str) -> None:
    vocab["another"] = vocab.pop(piece)


def added(number: int) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": "<new>", "special": True, **flags}


@pytest.mark.parametrize(
    ("family", "file", "change", "told"),
    [
        ("gpt2", "tokenizer.json", lambda c: c.pop("model"), "not a tokenizer of the tokenizers library"),
        ("gpt2", "tokenizer.json", lambda c: c["model"].pop("vocab"), "not a tokenizer of the tokenizers library"),
        ("gpt2", "tokenizer.json", lambda c: c["model"]["vocab"].update(z=2**40), "not a tokenizer of the tokenizers"),
        ("gpt2", "tokenizer.json", lambda c: c["model"]["vocab"].update(Ń=2**31), "id over 2"),
        ("gpt2", "tokenizer.json", lambda c: c["model"]["vocab"].update(Ń=5), "two tokens of one id"),
        ("gpt2", "tokenizer.json", lambda c: c["added_tokens"].append(added(900)), "ids of added tokens disagree"),
        ("gpt2", "tokenizer.json", lambda c: c.update(added_tokens=c["added_tokens"][:1]), "has no <image> id"),
        ("gpt2", "tokenizer.json", lambda c: c["added_tokens"][1].update(special=False), "has no <image> id"),
        ("gpt2", "tokenizer.json", lambda c: c["model"]["vocab"].pop("\u0120"), "not a tokenizer of the"),
        ("gpt2", "tokenizer.json", lambda c: rename(c["model"]["vocab"], "Ń"), "cannot hold every text"),
        ("gpt2", "tokenizer.json", lambda c: c["model"].update(dropout=0.1), "cannot hold every text"),
        ("llama2", "tokenizer.json", lambda c: c["model"].update(byte_fallback=False), "cannot hold every text"),
        ("gpt2", "tokenizer_config.json", lambda c: c.pop("eos_token"), "names no eos_token"),
        ("gpt2", "tokenizer_config.json", lambda c: c.update(eos_token="</s>"), "eos_token that is not in"),
        ("gpt2", "tokenizer_config.json", lambda c: c.update(bos_token="<bos>"), "bos_token that is not in"),
        ("gpt2", "tokenizer_config.json", lambda c: c.update(pad_token={"content": "[PAD]"}), "pad_token that is not"),
        ("gpt2", "tokenizer_config.json", lambda c: c.update(pad_token=7), "not a token"),
        ("gpt2", "tokenizer_config.json", lambda c: c.update(pad_token="<image>"), "also bos, eos or pad"),
        ("gpt2", "tokenizer_config.json", lambda c: c.update(eos_token="red"), "text becomes a special id"),
        ("qwen", "tokenizer_config.json", lambda c: c["added_tokens_decoder"].update(x=1), "not added tokens"),
        (
            "qwen",
            "tokenizer_config.json",
            lambda c: c["added_tokens_decoder"].update({"999": added(999)}),
            "'<new>' is 999 here and missing",
        ),
    ],
)
def test_faults(folders, tmp_path, family, file, change, told):
    folder = edit(copy(folders[family], tmp_path / "t"), file, change)
    with pytest.raises(UserError, match=told) as caught:
        open_tokenizer(folder)
    assert file in str(caught.value) or told == "text becomes a special id"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": "\\ud800"}'])
def test_files_that_are_no_json_objects(folders, tmp_path, file, content):
    folder = copy(folders["gpt2"], tmp_path / "t")
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(UserError, match="cannot read the tokenizer") as caught:
        open_tokenizer(folder)
    assert file in str(caught.value)


def test_damage_is_told_or_does_no_harm(folders, tmp_path):
    """Whatever a file holds: a tokenizer, or an error for the user."""
    folder = copy(folders["llama3"], tmp_path / "t")
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    places = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=3)

    @settings(max_examples=60)
    @given(st.sampled_from(sorted(files)), places, st.booleans())
    def check(name, damage, cut):
        content = bytearray(files[name])
        for place, value in damage:
            content[place % len(content)] = value
        (folder / name).write_bytes(content[: damage[0][0] % len(content)] if cut else content)
        try:
            tokenizer = open_tokenizer(folder)
        except UserError:
            return
        finally:
            (folder / name).write_bytes(files[name])
        assert not tokenizer.special_ids & set(tokenizer.encode("a <image> <|eot_id|>"))

    check()


def test_ids_with_holes(folders, tmp_path):
    """Holes are allowed within the vocabulary: its size is the highest id + 1."""
    folder = copy(folders["llama2"], tmp_path / "t")
    before = open_tokenizer(folder)

    def move(content):
        vocab = content["model"]["vocab"]
        vocab |= {"<image>": 700, "<pad>": 701}
        for token in content["added_tokens"][-2:]:
            token["id"] = vocab[token["content"]]

    edit(folder, "tokenizer.json", move)
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.image_id, tokenizer.pad_id) == (702, 700, 701)
    assert tokenizer.encode("red <image>") == before.encode("red <image>")
    assert tokenizer.decode([600]) == ""
