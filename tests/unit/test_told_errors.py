"""Which errors are told in a line, and which with their traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_conan import main as stage_main
from megatron_conan.config import RunConfig, load_config
from megatron_conan.main import is_told
from megatron_conan.train.run_folder import WriteError, read_config, writing


def _caught(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.value


def test_what_the_package_raises_itself_is_told(tmp_path: Path) -> None:
    assert is_told(_caught(lambda: load_config(tmp_path / "none.yaml", [])))
    assert is_told(_caught(lambda: read_config(tmp_path)))  # over several lines


def test_what_libraries_raise_needs_its_traceback() -> None:
    assert not is_told(_caught(lambda: np.zeros(3) + np.zeros(4)))
    assert not is_told(_caught(lambda: RunConfig.model_validate({})))
    assert not is_told(_caught(lambda: list(zip([1], [], strict=True))))
    assert not is_told(_caught(lambda: Path("/nowhere").read_bytes()))
    assert not is_told(ValueError("never raised"))


def test_status_and_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A mistake in the config: 2 and a line. One of the program within a run: 1 and where it is."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert stage_main.main("pretrain", ["--config", str(tmp_path / "none.yaml")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "Traceback" not in told

    def fail(config: RunConfig) -> None:
        np.zeros(3) + np.zeros(4)

    monkeypatch.setattr(stage_main, "run", fail)
    demo = Path(stage_main.ROOT) / "configs" / "demo" / "pretrain.yaml"
    assert stage_main.main("pretrain", ["--config", str(demo)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("rank 0 fails:\nTraceback")
    assert "could not be broadcast" in told


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def write() -> None:
        with writing(tmp_path / "table.npy"):
            raise OSError(28, "No space left on device")

    error = _caught(write)
    assert isinstance(error, WriteError)
    assert is_told(error)
