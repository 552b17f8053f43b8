"""A real Slurm cluster of four nodes on this machine, for as long as the tests of this folder run."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.faults import Cluster, Experiment, tree


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("MEGALM_SLURM") != "1":
        for item in items:
            if item.get_closest_marker("slurm"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: make test-slurm"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # A short path: Unix sockets lie in it.
    made = Cluster(Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")), nodes=4)
    try:
        made.up()
    except (RuntimeError, OSError) as error:
        shutil.rmtree(made.state, ignore_errors=True)
        pytest.skip(f"Slurm cannot be started here: {str(error).splitlines()[-1]}")
    try:
        yield made
    finally:
        made.down()
        shutil.rmtree(made.state, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.training.conftest import build_corpus

    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def whole(cluster: Cluster, slurm_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The run that nothing happens to."""
    run = Experiment(cluster, tree(slurm_corpus, tmp_path_factory.mktemp("whole") / "run"))
    run.wait_for_end(run.submit()[0])
    return run
