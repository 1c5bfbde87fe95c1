"""Shared by all tests: the tiny data set, made once a session."""

from pathlib import Path

import pytest

from tests.tiny import tiny_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and three sources (see tests/tiny.py). Read only: copy what you damage."""
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")
