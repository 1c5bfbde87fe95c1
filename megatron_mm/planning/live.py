"""Bytes that a piece of PyTorch work holds: every tensor storage counted once, from its first use to its release.

    with LiveBytes() as held:
        out = model(batch)
    held.now, held.peak

Works on the meta device, where nothing is allocated, and on real tensors alike. Storages that existed before are not
counted, such as parameters; autograd's saved tensors are, since what autograd keeps stays alive.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`now` and `peak` bytes of what was made inside, without what `exclude` holds."""

    def __init__(self, exclude: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in exclude or []}

    def restart_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
