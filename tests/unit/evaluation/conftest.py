"""A small exported model, made once a session."""

from pathlib import Path

import pytest

from megatron_mm.hf.exporter import export_tensors
from tests.unit.hf.sample import DictSource, megatron_tensors, run_config, train_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    run = run_config("qwen3 gqa")
    export_tensors(DictSource(run, megatron_tensors(run)), train_tokenizer(root), root / "model")
    return root / "model"
