"""One real Slurm for the tests of this folder; each test gets it with an empty queue and idle nodes."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster


@pytest.fixture(scope="session")
def _running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
        yield running


@pytest.fixture
def cluster(_running_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """Three nodes of 4 CPUs and 2 pretended GPUs. Fails, with what to install, where Slurm's daemons are missing."""
    yield _running_cluster
    _running_cluster.cancel_all()
