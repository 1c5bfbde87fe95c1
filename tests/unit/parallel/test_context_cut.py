"""Context parallelism's cut of a sequence: Megatron-Core's, whole, and put together again."""

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mm.parallel.backend import import_megatron
from megatron_mm.parallel.context import by_rank, in_order, own_positions

import_megatron()

from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank  # noqa: E402


@dataclass(frozen=True)
class Place:
    """What Megatron-Core asks of a process group here."""

    own_rank: int
    members: int

    def rank(self) -> int:
        return self.own_rank

    def size(self) -> int:
        return self.members


sizes = st.integers(2, 6)
chunks = st.integers(1, 5)


@given(sizes, chunks, st.integers(1, 3))
def test_ranks_hold_what_megatron_cores_rotary_embeddings_expect(size: int, chunk: int, rows: int) -> None:
    s = 2 * size * chunk
    x = torch.randn(rows, s, 3)
    for rank in range(size):
        assert torch.equal(own_positions(x, rank, size), get_pos_emb_on_this_cp_rank(x, 1, Place(rank, size)))


@given(sizes, chunks)
def test_every_position_is_held_once_and_comes_back_in_order(size: int, chunk: int) -> None:
    x = torch.arange(2 * size * chunk)
    parts = torch.stack([own_positions(x.unsqueeze(0), rank, size)[0] for rank in range(size)])
    assert torch.equal(in_order(parts), x)
    assert torch.equal(by_rank(x, size), parts)


def test_a_group_of_one_holds_everything() -> None:
    x = torch.randn(2, 5)  # an odd length: nothing is cut
    assert own_positions(x, 0, 1) is x
