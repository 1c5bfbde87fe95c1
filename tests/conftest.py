"""Shared by all tests: the tiny data set, made once a session; how hypothesis works; what MPI leaves in memory."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny import tiny_data

# New examples each time, and no test fails because the machine is busy.
settings.register_profile("tests", derandomize=False, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and three sources (see tests/tiny.py). Read only: copy what you damage."""
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session", autouse=True)
def _free_shared_memory() -> Iterator[None]:
    """MPICH leaves some MB behind whenever a run is aborted or killed."""
    before = _mpi_segments()
    yield
    maps = ""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended, or another user's
            maps += (process / "maps").read_text()
    for segment in _mpi_segments() - before:
        if str(segment) not in maps:
            segment.unlink(missing_ok=True)


def _mpi_segments() -> set[Path]:
    """This user's."""
    found = set()
    for path in Path("/dev/shm").glob("mpich_shm_*"):
        with suppress(FileNotFoundError):
            if path.stat().st_uid == os.getuid():
                found.add(path)
    return found
