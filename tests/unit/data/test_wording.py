"""What stands between texts and pictures."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from megatron_mm.data.ingest import Picture, Text
from megatron_mm.data.ingest.wording import caption_parts, document_parts

P, Q = Picture(b"p"), Picture(b"q")


def test_captions():
    for caption in ("a photo of", " a photo of", "a photo of\n", "\t a photo of \r\n"):
        assert caption_parts(P, caption) == (P, Text(" a photo of"))
    assert caption_parts(P, "two\n lines") == (P, Text(" two\n lines"))


def test_documents():
    assert document_parts(["a", P, Q, "b"]) == (Text("a\n"), P, Q, Text("\nb"))
    assert document_parts(["a", "b", " ", "c\n\nd ", P]) == (Text("a\nb\nc\n\nd\n"), P)
    assert document_parts([P, "", "a"]) == (P, Text("\na"))
    assert document_parts([P]) == (P,)
    assert document_parts([]) == ()


@given(st.lists(st.sampled_from((P, Q)) | st.text("ab \n", max_size=4)))
def test_documents_keep_order_and_put_one_newline_between(blocks):
    parts = document_parts(blocks)
    assert [part for part in parts if isinstance(part, Picture)] == [b for b in blocks if isinstance(b, Picture)]
    shown = "".join(part.text if isinstance(part, Text) else "#" for part in parts)
    lines = "\n".join(
        "#" if isinstance(b, Picture) else b.strip() for b in blocks if not isinstance(b, str) or b.strip()
    )
    while "#\n#" in lines:
        lines = lines.replace("#\n#", "##")
    assert shown == lines
    assert not any(isinstance(a, Text) and isinstance(b, Text) for a, b in itertools.pairwise(parts))
