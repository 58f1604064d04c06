"""Fixtures of all tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gloo_pool import WorkerPool
from tiny_data import tiny_data

__all__ = ["tiny_data"]

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
sys.path.append(str(ROOT / "benchmarks"))  # what reads external data serves benchmarks and tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-data",
        type=Path,
        default=REAL_DATA,
        metavar="DIR",
        help="folder of external data (default: ../shared/data beside the checkout)",
    )
    parser.addoption(
        "--rewrite-golden",
        action="store_true",
        help="write the golden losses of tests/golden anew instead of comparing",
    )


@pytest.fixture(scope="session")
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder of external data; tests that ask for it are skipped where it is absent."""
    folder: Path = request.config.getoption("--real-data")
    if not folder.is_dir():
        pytest.skip(f"no external data at {folder}; name its folder with --real-data DIR")
    return folder.resolve()


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """`workers.run(fn, world_size, *args)` -> list of what each rank's fn(*args) returned, under real gloo groups."""
    pool = WorkerPool()
    yield pool
    pool.remove()
