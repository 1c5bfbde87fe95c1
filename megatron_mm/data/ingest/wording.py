"""How text and pictures are put next to each other, for all formats but JSONL, where that is the user's.

    caption      IMAGE, one space, the caption: as MM1's prompts are ("{IMAGE} A photo of")
    interleaved  every text and every run of pictures on lines of their own: TEXT \\n IMAGE IMAGE \\n TEXT

White space around a text is not part of it; within it nothing changes.
"""

from collections.abc import Iterable

from megatron_mm.data.ingest import Part, Picture, Text


def caption_parts(picture: Picture, caption: str) -> tuple[Part, ...]:
    """Picture and caption; the caption must hold more than white space."""
    return picture, Text(" " + caption.strip())


def document_parts(blocks: Iterable[Picture | str]) -> tuple[Part, ...]:
    """A document of texts and pictures in reading order; texts that are empty are left out, neighbours are joined."""
    parts: list[Part] = []
    for block in blocks:
        last = parts[-1] if parts else None
        if isinstance(block, Picture):
            if isinstance(last, Text):
                parts[-1] = Text(last.text + "\n")
            parts.append(block)
        elif text := block.strip():
            if isinstance(last, Text):
                parts[-1] = Text(last.text + "\n" + text)
            else:
                parts.append(Text("\n" + text if last else text))
    return tuple(parts)
