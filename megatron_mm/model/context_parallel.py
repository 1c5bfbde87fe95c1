"""Attention under context parallelism: positions are exchanged for heads, and back (Ulysses, arXiv 2309.14509).

    [s/cp, b, heads, d] ── all-to-all ──▶ [s, b, heads/cp, d] ── attention ──▶ ── all-to-all ──▶ [s/cp, b, heads · d]

Between the exchanges a rank sees whole sequences, so any attention serves, local or Transformer Engine's, with any
borders of documents. Transformer Engine's own context parallelism passes keys around a ring instead; for packed
documents it needs each of them padded to a multiple of 2·cp tokens, and it runs on no CPU.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_mm.model.attention import packed_documents
from megatron_mm.parallel.backend import import_megatron
from megatron_mm.parallel.context import by_rank, in_order

import_megatron()

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


class ContextParallelAttention(MegatronModule):
    """Megatron-Core's core attention `inner` over whole sequences, for a part of this tensor-parallel rank's heads.

    Query [s/cp, b, heads, d], key and value [s/cp, b, groups, d], positions cut as `parallel/context.py` says →
    [s/cp, b, heads · d]. heads and groups are multiples of cp. Documents are told by a mask of the whole sequences,
    bool [b, 1, s, s], or by `packed_seq_params` with the borders of all rows (see `document_starts`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        inner: Callable[..., Any],
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,  # of Transformer Engine's ring, which is not used
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.group = pg_collection.cp
        size = config.context_parallel_size
        part = copy.copy(config)
        part.context_parallel_size = 1
        part.num_attention_heads //= size
        part.num_query_groups //= size
        self.inner = inner(part, *args, pg_collection=pg_collection, **kwargs)

    def _to_heads(self, x: Tensor) -> Tensor:
        """[s/cp, b, n, d] → [s, b, n/cp, d]."""
        parts = x.unflatten(2, (self.group.size(), -1)).movedim(2, 0).contiguous()  # [cp, s/cp, b, n/cp, d]
        return in_order(tensor_parallel.all_to_all(self.group, parts))

    def _to_positions(self, x: Tensor) -> Tensor:
        """[s, b, n/cp · d] → [s/cp, b, n · d]."""
        parts = by_rank(x, self.group.size())  # [cp, s/cp, b, n/cp · d]
        return tensor_parallel.all_to_all(self.group, parts).movedim(0, 2).flatten(2)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        query, key, value = self._to_heads(query), self._to_heads(key), self._to_heads(value)
        if packed_seq_params is None:
            return self._to_positions(self.inner(query, key, value, attention_mask, **kwargs))
        s, b = query.shape[:2]
        rows = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]  # [b · s, n/cp, d]
        documents = packed_documents(packed_seq_params.cu_seqlens_q, s)
        output = self.inner(*rows, attention_mask, packed_seq_params=documents, **kwargs)
        return self._to_positions(output.view(b, s, -1).transpose(0, 1).contiguous())
