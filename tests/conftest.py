"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest
from gloo_pool import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """`workers.run(fn, world_size, *args)` -> list of what each rank's fn(*args) returned, under real gloo groups."""
    pool = WorkerPool()
    yield pool
    pool.remove()
