"""Attention over packed documents by Transformer Engine's fused kernels, told the borders (`thd`), against plain
attention in fp64 under the mask of the same documents. `make test-gpu`.

Not yet run on a GPU (docs/status.md).
"""

import importlib.util

import pytest
import torch

from megatron_mm.model.attention import attention_mask, document_starts, packed_documents

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a GPU and Transformer Engine, and they are not here",
)
ROWS, LENGTH = 2, 1024
# Document numbers by position: one, some of all lengths, and padding at the end.
BORDERS = {"one": [], "three": [1, 700], "many": list(range(3, 1024, 37)), "padded": [100, 900]}


def documents(name: str) -> torch.Tensor:
    starts = torch.zeros(LENGTH, dtype=torch.int32)
    starts[BORDERS[name]] = 1
    numbers = starts.cumsum(0, dtype=torch.int32)
    if name == "padded":
        numbers[900:] = -1
    rows = numbers.repeat(ROWS, 1)
    rows[1] = torch.where(torch.arange(LENGTH) < 511, 0, 1)  # the rows differ
    return rows.cuda()


@pytest.mark.parametrize("heads", [(24, 24), (24, 8)], ids=["all-heads", "grouped"])
@pytest.mark.parametrize("name", BORDERS)
def test_is_that_of_the_mask(name: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")  # no silent fall back to plain kernels
    from transformer_engine.pytorch import DotProductAttention

    queries, keys = heads
    width = 128
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(ROWS * LENGTH, n, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for n in (queries, keys, keys)
    )
    where = documents(name)
    packed = packed_documents(document_starts(where), LENGTH)
    layer = DotProductAttention(
        queries, width, num_gqa_groups=keys, qkv_format="thd", attn_mask_type="padding_causal", attention_dropout=0.0
    )
    output = layer(
        q, k, v, cu_seqlens_q=packed.cu_seqlens_q, cu_seqlens_kv=packed.cu_seqlens_kv,
        max_seqlen_q=packed.max_seqlen_q, max_seqlen_kv=packed.max_seqlen_kv,
    ).view(ROWS * LENGTH, queries, width)  # fmt: skip
    real = (where >= 0).flatten()  # padding has no loss: what stands there does not matter
    weight = torch.randn_like(output) * real[:, None, None]
    output.backward(weight)

    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    rows = [t.view(ROWS, LENGTH, -1, width).transpose(1, 2) for t in exact]
    rows[1:] = [t.repeat_interleave(queries // keys, dim=1) for t in rows[1:]]
    scores = rows[0] @ rows[1].transpose(-1, -2) / width**0.5
    wanted = scores.masked_fill(attention_mask(where), float("-inf")).softmax(-1) @ rows[2]
    wanted = wanted.transpose(1, 2).reshape(output.shape)
    (wanted * weight)[real].sum().backward()
    assert (output[real].double() - wanted[real]).norm() <= 0.01 * wanted[real].norm()
    for ours, theirs in zip((q, k, v), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad.double() - theirs.grad).norm() <= 0.02 * theirs.grad.norm()
