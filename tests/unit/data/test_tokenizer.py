import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.data.tokenizer import open_tokenizer, train_tokenizer
from megatron_mm.errors import UserError


def test_ids_are_the_contracts(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id) == (0, 2, 3, 4)
    assert tokenizer.vocab_size == 320
    assert len(tokenizer.hash) == 64


def test_any_text_comes_back(tokenizer):
    @settings(max_examples=300)
    @given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("▁ \n<>image/s0xA1|\t\0é"))
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids, default=5) >= 5  # never pad, unk, bos, eos or image

    check()


@pytest.mark.parametrize(
    "text", ["<image>", "a <image> b", "<s></s><pad>", "<0x41>", "▁▁", "  two  spaces ", "\n\n", "\r\n"]
)
def test_text_that_looks_special(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2, 3, 4} & set(ids)


def test_parts_join(tokenizer):
    parts = [" red circle", "\n", " blue", "", " square\n"]
    assert tokenizer.decode([i for part in parts for i in tokenizer.encode(part)]) == "".join(parts)


def test_same_text_same_file(tmp_path, tokenizer):
    texts = [f" red {i} blue" for i in range(50)]
    for name in ("a", "b"):
        train_tokenizer(texts, tmp_path / name, 290, seed=3)
    assert open_tokenizer(tmp_path / "a").hash == open_tokenizer(tmp_path / "b").hash != tokenizer.hash


def test_vocabulary_that_cannot_be(tmp_path):
    for texts, size, told in ((["ab"] * 9, 5000, "at most"), (["ab"] * 9, 262, "at least"), ([], 300, "no text")):
        with pytest.raises(UserError, match=told):
            train_tokenizer(texts, tmp_path / "t.model", size)
    assert list(tmp_path.iterdir()) == []


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        open_tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"no model at all")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        open_tokenizer(tmp_path / "bad.model")
    plain = tmp_path / "plain.model"
    with plain.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["red blue"] * 20), model_writer=file, vocab_size=12, pad_id=3, minloglevel=2
        )
    with pytest.raises(UserError, match="<image>"):
        open_tokenizer(plain)
