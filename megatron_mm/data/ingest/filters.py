"""MM1's filters for documents with pictures: which pictures go, and which documents go for what is left of them.

A picture that goes takes its place in the text with it: the document is as if the picture had never been there. What is
filtered is not bad: it is counted apart.
"""

import hashlib
from dataclasses import dataclass

URL_WORDS = ("logo", "button", "icon", "plugin", "widget")


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The rules; None, False and () switch one off, as all are by default.

    A picture's own rules come first, then those of its page, then how often it is seen in the whole input, among the
    pictures that are left. Documents are judged last, by the pictures that they keep.
    """

    drop_corrupt_images: bool = False  # False: they put their document into quarantine
    min_image_side: int | None = None  # pixels
    max_image_side: int | None = None
    max_image_aspect: float | None = None  # longer side / shorter side
    url_words: tuple[str, ...] = ()  # that no picture's URL may hold, in any case
    first_on_page: bool = False  # of pictures with the same URL or the same bytes in a document, keep the first
    max_image_repeats: int | None = None  # a URL, or bytes, seen more often in the whole input go everywhere
    min_document_images: int = 0
    max_document_images: int | None = None

    @classmethod
    def mm1(cls) -> "Filters":
        """As for MM1's interleaved documents."""
        return cls(
            drop_corrupt_images=True,
            min_image_side=100,
            max_image_side=10_000,
            max_image_aspect=2.0,
            url_words=URL_WORDS,
            first_on_page=True,
            max_image_repeats=10,
            min_document_images=1,
            max_document_images=30,
        )

    def url_fault(self, url: str) -> str:
        """Why a picture from this URL goes; "": it stays."""
        if self.url_words:
            lower = url.lower()
            if word := next((word for word in self.url_words if word.lower() in lower), ""):
                return f"URL holds {word}"
        return ""

    @property
    def looks_at_size(self) -> bool:
        return (self.min_image_side, self.max_image_side, self.max_image_aspect) != (None, None, None)

    def size_fault(self, width: int, height: int) -> str:
        """Why a picture of this size goes; "": it stays."""
        short, long = sorted((width, height))
        if self.min_image_side is not None and short < self.min_image_side:
            return f"side under {self.min_image_side} pixels"
        if self.max_image_side is not None and long > self.max_image_side:
            return f"side over {self.max_image_side} pixels"
        if self.max_image_aspect is not None and long > self.max_image_aspect * short:
            return f"aspect over {self.max_image_aspect:g}"
        return ""

    def document_fault(self, images: int) -> str:
        """Why a document that has kept so many pictures goes; "": it stays."""
        if images < self.min_document_images:
            return "no images" if not images else f"under {self.min_document_images} images"
        if self.max_document_images is not None and images > self.max_document_images:
            return f"over {self.max_document_images} images"
        return ""


def url_hash(url: str) -> int:
    """64 bits that stand for a URL; 0: it is not known."""
    if not url:
        return 0
    digest = hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=8, person=b"url").digest()
    return int.from_bytes(digest, "little")
