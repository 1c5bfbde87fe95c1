"""The checkpoint's files alone: boxes of flat ranges, reading across boxes, and every way a folder can be wrong."""

import json
import math
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_mm.config import RunConfig, config_from_dict
from megatron_mm.errors import UserError
from megatron_mm.training.checkpoint import flat_range_boxes
from megatron_mm.training.checkpoint_files import CheckpointReader, complete, latest, read_tensors, write_tensors
from tests.parallel.recipes import MODEL


@pytest.fixture
def config() -> RunConfig:
    data = {"tokenizer": "t", "sources": [{"path": "s", "weight": 1}], "seq_length": 48}
    return config_from_dict({"run_dir": "run", "model": MODEL, "data": data, "training": {"steps": 1}})


def test_boxes_tile_the_range_exactly() -> None:
    draw = random.Random(0)
    for _ in range(500):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 4)))
        total = math.prod(shape)
        start, end = sorted((draw.randint(0, total), draw.randint(0, total)))
        whole = torch.arange(total).view(shape)
        seen = []
        for at, offset, box in flat_range_boxes(start, end, shape):
            part = whole[tuple(slice(o, o + n) for o, n in zip(offset, box, strict=True))].flatten()
            assert part.tolist() == list(range(at, at + part.numel()))
            seen += part.tolist()
        assert seen == list(range(start, end)), (shape, start, end)


def test_round_trip_and_boxes(tmp_path: Path, config: RunConfig) -> None:
    tensors = {f"t{i}": torch.randn(6, 5, dtype=torch.float32) for i in range(5)} | {"v": torch.randn(7).bfloat16()}
    write_tensors(tmp_path / "step-00000000", config, tensors, {"note": 1}, max_file_bytes=300)
    reader = read_tensors(tmp_path / "step-00000000")
    assert len(reader.index["files"]) > 1
    assert reader.config == config
    assert reader.extra == {"note": 1}
    assert sorted(reader.keys()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor(name), tensor)
    assert torch.equal(reader.box("t3", (1, 2), (3, 2)), tensors["t3"][1:4, 2:4])
    assert latest(tmp_path) == tmp_path / "step-00000000"


def test_an_existing_folder_is_never_overwritten(tmp_path: Path, config: RunConfig) -> None:
    write_tensors(tmp_path / "step-00000000", config, {"a": torch.ones(2)})
    with pytest.raises(UserError, match="already there"):
        write_tensors(tmp_path / "step-00000000", config, {"a": torch.zeros(2)})
    assert torch.equal(read_tensors(tmp_path / "step-00000000").tensor("a"), torch.ones(2))


def test_a_failure_leaves_nothing(tmp_path: Path, config: RunConfig) -> None:
    """Neither an error while the tensors come nor one while they are written; what others left there stays."""

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(100)
        yield "b", torch.ones(100)
        raise KeyboardInterrupt

    others = tmp_path / "out.tmp-1"
    others.mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "out", config, failing(), max_file_bytes=300)
    with pytest.raises(UserError, match=r"none\.model"):
        write_tensors(tmp_path / "out", config, {"a": torch.ones(2)}, tokenizer=tmp_path / "none.model")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as if the disk were full
    try:
        with pytest.raises(UserError, match="space and permission"):
            write_tensors(tmp_path / "out", config, {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [others]


def test_a_leftover_is_not_removed(tmp_path: Path, config: RunConfig) -> None:
    """It has this process's number, but this process did not make it."""
    leftover = tmp_path / f"out.tmp-{os.getpid()}"
    leftover.mkdir()
    (leftover / "file").write_text("kept")
    with pytest.raises(UserError, match="already there"):
        write_tensors(tmp_path / "out", config, {"a": torch.ones(2)})
    assert (leftover / "file").read_text() == "kept"
    assert not (tmp_path / "out").exists()


def test_wrong_folders(tmp_path: Path, config: RunConfig) -> None:
    with pytest.raises(UserError, match="not a checkpoint"):
        read_tensors(tmp_path)
    (tmp_path / "step-00000007").mkdir()
    assert complete(tmp_path) == []  # no index: never finished
    (tmp_path / "step-00000007" / "index.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="not a checkpoint of this format"):
        read_tensors(tmp_path / "step-00000007")
    assert latest(tmp_path) is None
    write_tensors(tmp_path / "good", config, {"a": torch.ones(100), "b": torch.ones(2, 2)})
    with pytest.raises(UserError, match="no such tensor"):
        read_tensors(tmp_path / "good").tensor("c")
    index = json.loads((tmp_path / "good" / "index.json").read_text())
    index["tensors"]["b"]["boxes"][0]["shape"] = [1, 2]
    (tmp_path / "good" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="2 elements short"):
        CheckpointReader(tmp_path / "good").tensor("b")
    file = tmp_path / "good" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        read_tensors(tmp_path / "good")
