"""One cluster for all Slurm tests, which run under ``tests/slurm/run.sh`` alone: it makes the namespaces they need."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.training import OPTIONS, SETTINGS

REPOSITORY = Path(__file__).parents[2]
FOLDER = os.environ.get("MEGAQAD_SLURM_FOLDER")
NODES = 12

collect_ignore_glob = [] if FOLDER else ["test_*.py"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """All nodes idle; what is typed on it is typed in the folder that holds ``.venv``, as a user's checkout does."""
    assert FOLDER is not None
    (Path(FOLDER) / ".venv").symlink_to(REPOSITORY / ".venv")
    cluster = Cluster(Path(FOLDER), NODES)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def peaceful_job(cluster: Cluster) -> str:
    """The training that nothing happens to; it runs beside the tests that need no processor."""
    script = str(REPOSITORY / "launch" / "slurm.sbatch")
    return cluster.submit(*OPTIONS, "--job-name=peaceful", script, "distill", *SETTINGS, "output_dir=peaceful")
