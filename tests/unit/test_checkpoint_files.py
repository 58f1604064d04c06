"""Checkpoint folders without tensors: which count, and what is seen of damage."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from megatron_conan.train.checkpoint_files import (
    STATE,
    SUMS,
    commit,
    file_sum,
    find_damage,
    find_damage_beside,
    is_readable,
    saved_checkpoints,
    seal,
    temporary_folder,
)


def _checkpoint(run: Path, step: int) -> Path:
    """A whole one, named by `latest`."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    temporary = temporary_folder(folder)
    temporary.mkdir(parents=True)
    (temporary / STATE).write_text(json.dumps({"step": step, "tokenizer_sha256": "abc"}))
    (temporary / ".metadata").write_bytes(b"index")
    for rank in (0, 1):
        (temporary / f"__{rank}_0.distcp").write_bytes(bytes(range(100)))
    seal(temporary, {})
    commit(folder, keep_last=2, keep_every=None)
    return folder


def _names(run: Path) -> list[str]:
    return [folder.name for folder in saved_checkpoints(run)]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"\0" * 14, b"step_00000999\n", b"step_000"])
def test_a_latest_that_names_nothing_is_passed_over(content: bytes, tmp_path: Path) -> None:
    _checkpoint(tmp_path, 2)
    _checkpoint(tmp_path, 4)
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    assert _names(tmp_path) == ["step_00000004", "step_00000002"]


def test_one_that_has_its_name_but_is_not_named_by_latest_does_not_count(tmp_path: Path) -> None:
    """As it is when a run is killed between the two."""
    _checkpoint(tmp_path, 2)
    _checkpoint(tmp_path, 4)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000002\n")
    assert _names(tmp_path) == ["step_00000002"]
    _checkpoint(tmp_path, 4)
    assert _names(tmp_path) == ["step_00000004", "step_00000002"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_every_damage_is_found(tmp_path: Path) -> None:
    whole = _checkpoint(tmp_path, 2)
    assert find_damage(whole) == []
    contents = {file.name: file.read_bytes() for file in whole.iterdir()}
    for name, content in contents.items():
        file = whole / name
        places = range(len(content)) if name == SUMS else (0, len(content) // 2, len(content) - 1)
        damaged = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in places]
        # a list without its last newline says the same
        damaged += [content[:length] for length in range(0, len(content) - (name == SUMS), 7)]
        for one in damaged:
            file.write_bytes(one)
            assert find_damage(whole), (name, one)
            parts = [find_damage(whole, part, 3) for part in range(3)]
            assert sorted(what for part in parts for what in part) == sorted(find_damage(whole)), (name, one)
        file.unlink()
        assert find_damage(whole) == [f"{name} is missing"]
        file.write_bytes(content)
    assert find_damage(whole) == []


def test_a_list_that_lost_lines_is_damage(tmp_path: Path) -> None:
    """What it no longer lists could be anything."""
    whole = _checkpoint(tmp_path, 2)
    lines = (whole / SUMS).read_text().splitlines(keepends=True)
    for i, line in enumerate(lines):
        (whole / SUMS).write_text("".join(lines[:i] + lines[i + 1 :]))
        name = line.split()[1]
        assert find_damage(whole) == [f"{name} isn't listed in {SUMS}"]


def test_a_state_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    whole = _checkpoint(tmp_path, 2)
    assert is_readable(whole)
    text = (whole / STATE).read_text()
    for other in (text.replace("abc", "abd"), "{}", "", "{"):
        (whole / STATE).write_text(other)
        assert not is_readable(whole)
    (whole / STATE).write_text(text)
    assert is_readable(whole)
    (whole / SUMS).unlink()
    assert not is_readable(whole)


def test_a_copy_beside_a_checkpoint_is_neither_used_nor_removed(tmp_path: Path) -> None:
    for step in (2, 4):
        _checkpoint(tmp_path, step)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_00000002", folder / "step_00000002.bak")
    for step in (6, 8):
        _checkpoint(tmp_path, step)
    assert _names(tmp_path) == ["step_00000008", "step_00000006"]
    assert sorted(path.name for path in folder.glob("step_*")) == [
        "step_00000002.bak",
        "step_00000006",
        "step_00000008",
    ]


def test_steps_of_more_digits_are_later(tmp_path: Path) -> None:
    for step in (99_999_998, 100_000_000):
        _checkpoint(tmp_path, step)
    assert _names(tmp_path) == ["step_100000000", "step_99999998"]


def test_one_that_cannot_be_removed_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on NFS, while somebody reads it."""
    _checkpoint(tmp_path, 2)
    _checkpoint(tmp_path, 4)

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else refuse(path))
        _checkpoint(tmp_path, 6)
    assert "step_00000002, which is no longer kept, can't be removed" in capsys.readouterr().err
    assert _names(tmp_path) == ["step_00000006", "step_00000004"]


def test_files_beside_a_checkpoint(tmp_path: Path) -> None:
    """Those that a hook's state lists."""
    table = tmp_path / "negatives" / "table.npy"
    table.parent.mkdir()
    table.write_bytes(b"123")
    folder = _checkpoint(tmp_path, 2)
    assert find_damage_beside(folder) == []
    state = {"hooks": {"mining": {"sums": {"negatives/table.npy": file_sum(table)}}, "evaluation": {}}}
    (folder / STATE).write_text(json.dumps(state))
    assert find_damage_beside(folder) == []
    table.write_bytes(b"124")
    assert find_damage_beside(folder)[0].startswith("negatives/table.npy is not what was written (its SHA-256 differs")
    table.unlink()
    assert find_damage_beside(folder) == ["negatives/table.npy is missing"]
