"""A tokenizer and exported folders, made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mm.hf.exporter import export_tensors
from tests.unit.hf.sample import DictSource, megatron_tensors, run_config, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def exported(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Variant → the folder that its random tensors were exported to."""
    root, made = tmp_path_factory.mktemp("exported"), {}

    def export(variant: str) -> Path:
        if variant not in made:
            made[variant] = root / variant.replace(" ", "-")
            run = run_config(variant)
            export_tensors(DictSource(run, megatron_tensors(run)), tokenizer_file, made[variant])
        return made[variant]

    return export
