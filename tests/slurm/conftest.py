"""Clusters to test on; the tests of this folder need ``-m slurm``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from slurm.cluster import Cluster, why_not


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def can_cluster() -> None:
    """Skips where no cluster can be brought up."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def cluster(can_cluster: None) -> Iterator[Cluster]:
    """Two nodes; up in half a second, so every test has its own and spoils nothing for others."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def make_cluster(can_cluster: None) -> Iterator[Callable[..., Cluster]]:
    """Brings up clusters of other kinds, for one test."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(Cluster(**settings))
