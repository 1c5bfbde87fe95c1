"""Documents as the packer sees them, without any source's files."""

import numpy as np
from hypothesis import strategies as st

from megatron_mm.config import SequenceLayout
from megatron_mm.data.pieces import Limits

LAYOUT = SequenceLayout(
    seq_length=64, max_images=5, tokens_per_image=4, image_size=16, image_token_id=4, bos_token_id=2, eos_token_id=3,
    pad_token_id=0,
)  # fmt: skip
MM1 = Limits(positions=4096, images=16, tokens_per_image=144)


class Documents:
    """As the packer sees them: lengths and image places, which are spread evenly over the document."""

    def __init__(self, lengths: np.ndarray, images: np.ndarray) -> None:
        self.lengths = lengths.astype(np.int32)
        self.image_starts = np.concatenate([[0], np.cumsum(images, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.lengths)

    def meta(self, document: int) -> dict[str, np.ndarray]:
        count = int(self.image_starts[document + 1] - self.image_starts[document])
        return {"offset": 1 + np.arange(count) * ((int(self.lengths[document]) - 2) // count)}


class Placed(Documents):
    """With image places as given."""

    def __init__(self, documents: list[tuple[int, list[int]]]) -> None:
        super().__init__(np.array([n for n, _ in documents]), np.array([len(places) for _, places in documents]))
        self._places = [np.array(places, dtype="<u4") for _, places in documents]

    def meta(self, document: int) -> dict[str, np.ndarray]:
        return {"offset": self._places[document]}


def corpus(kind: str, n: int, seed: int = 0) -> Documents:
    """Of MM1's three kinds, or all of them in its shares."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(["caption", "interleaved", "text"], n, p=[0.45, 0.45, 0.1])
    is_caption, is_text = (
        (kinds == "caption", kinds == "text") if kind == "mixed" else (kind == "caption", kind == "text")
    )
    words = np.where(is_caption, rng.integers(20, 201, n), rng.lognormal(6.2, 1, n).astype(np.int64) + 1)
    images = np.where(is_caption, 1, np.where(is_text, 0, rng.geometric(1 / 3, n)))
    return Documents(2 + words + images, images)


@st.composite
def documents(draw):
    """Lengths and image places: bos is no image, eos is none; runs of images occur."""
    found = []
    for _ in range(draw(st.integers(1, 30))):
        n = draw(st.integers(2, 90))
        places = draw(st.lists(st.integers(1, n - 2), unique=True, max_size=25)) if n > 2 else []
        found.append((n, sorted(places)))
    return found


limits_ = st.builds(Limits, positions=st.integers(12, 80), images=st.integers(1, 6), tokens_per_image=st.integers(1, 9))
