"""How attention is kept inside documents: a mask for the local layers, document borders for Transformer Engine's.

RoPE is relative, so positions need not restart with a document for its attention to be that of the document alone.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def attention_mask(documents: Tensor) -> Tensor:
    """int [b, s] document numbers → bool [b, 1, s, s], True where attention is NOT allowed (Megatron's sense)."""
    s = documents.shape[1]
    causal = torch.ones(s, s, dtype=torch.bool, device=documents.device).tril()
    same = documents.unsqueeze(1) == documents.unsqueeze(2)
    return ~(same & causal).unsqueeze(1)


def document_starts(documents: Tensor) -> Tensor:
    """int [b, s] document numbers → int32 [n + 1]: where each document starts among the b·s positions of all rows, one
    after the other, and their end. A row's padding counts as a document of its own: nothing else sees it."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = first.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([documents.numel()])]).to(torch.int32)


def image_starts(images: int, positions: int, tile: int, device: torch.device) -> Tensor:
    """int32: where each image starts in a row of all of them, padded to whole tiles, and the row's end. The padding, if
    there is any, counts as a document of its own. Made without a copy from the host."""
    starts = torch.arange(images + 1, dtype=torch.int32, device=device) * positions
    end = images * positions
    padding = -end % tile
    return torch.nn.functional.pad(starts, (0, 1), value=end + padding) if padding else starts


def packed_documents(starts: Tensor, seq_length: int, rows: Literal["thd", "sbhd"] = "thd") -> "PackedSeqParams":
    """What attention is told instead of a mask. `seq_length` bounds a document's length: the exact longest one would
    make the host wait for the device. rows: end to end (thd), or beside each other until attention lays them so."""
    from megatron.core.packed_seq_params import PackedSeqParams

    return PackedSeqParams(
        qkv_format=rows,
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=seq_length,
        max_seqlen_kv=seq_length,
    )
