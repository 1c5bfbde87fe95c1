"""What the rest of the stack needs of a tokenizer, whatever file it comes from."""

from typing import Protocol

IMAGE_PIECE = "<image>"


class Tokenizer(Protocol):
    """Text to ids and back.

    No text is ever encoded to a special id: "<image>", "<s>" or "<|endoftext|>" typed in a text are ordinary pieces.
    Nothing is added around a text either. Safe to use from threads, and in processes forked or spawned with it.
    """

    path: str
    hash: str  # SHA-256 of what decides the ids; sources carry it
    vocab_size: int  # the highest id + 1, added tokens included
    pad_id: int
    bos_id: int  # starts a document
    eos_id: int  # ends a document
    image_id: int  # stands where a picture is
    special_ids: frozenset[int]  # those above, and all others that no text is encoded to

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without bos and eos. Raises UnicodeEncodeError for text that UTF-8 cannot hold."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of the ids. Special ones, images among them, are left out."""
        ...
