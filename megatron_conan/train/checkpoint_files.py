"""A run's checkpoints as folders: their names, what makes one whole, and which are kept.

checkpoints/step_00000100/       what megatron-core writes, conan.json, SHA256SUMS (`sha256sum -c` reads it)
checkpoints/.step_00000100.tmp/  one that is being written
checkpoints/latest               name of the newest whole checkpoint
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_conan.data.durable import sync
from megatron_conan.train.run_folder import write_atomically

SUMS = "SHA256SUMS"
STATE = "conan.json"
NAME = re.compile(r"step_\d{8,}")
"""What a checkpoint's folder is called; a copy beside it, such as step_00000100.old, isn't one."""
NEEDED = ("*.distcp", ".metadata", "common.pt", "metadata.json")
"""What megatron-core reads."""


def checkpoint_name(step: int) -> str:
    """Name of the folder of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def temporary_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return folder.with_name(f".{folder.name}.tmp")


def saved_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, newest first, from the one on that `latest` names.

    So writing an older name into `latest` takes a run back. Where it names none that is there, all count.
    """
    folders = _named_folders(run_dir / "checkpoints")[::-1]
    latest = run_dir / "checkpoints" / "latest"
    named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.exists() else ""
    names = [folder.name for folder in folders]
    return folders[names.index(named) :] if named in names else folders


def _named_folders(parent: Path) -> list[Path]:
    """Checkpoints in order of their steps."""
    folders = [folder for folder in parent.glob("step_*") if NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(folders, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint, None if the run has none; whether it is whole, `find_damage` says."""
    return next(iter(saved_checkpoints(run_dir)), None)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` names: a run folder (its latest) or a step_* folder itself.

    Raises:
        ValueError: if there is none.
    """
    if (path / STATE).exists():
        return path
    folder = latest_checkpoint(path)
    if folder is None:
        raise ValueError(
            f"{path} holds no checkpoint (neither checkpoints/step_* nor conan.json is there): run the stage that makes it "
            "first, or set checkpoint.init_from=null to start from random weights"
        )
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """The small state saved with a checkpoint. Raises ValueError if it can't be read."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"checkpoint {folder} is damaged: {STATE} can't be read ({error}); name another one"
        ) from error
    return state


def is_readable(folder: Path) -> bool:
    """Whether `read_state` can be believed: the state is as it was written. `find_damage` looks at everything."""
    try:
        line = f"{file_sum(folder / STATE)}  {STATE}"
        return line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False


def file_sum(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(folder: Path, sums: Mapping[str, str]) -> None:
    """Write SHA256SUMS over all files of a checkpoint; those that `sums` lacks are read, and synced to the disk."""
    names = sorted(file.name for file in folder.iterdir() if file.name != SUMS)
    for name in names:
        if name not in sums:
            sync(folder / name)
    lines = [f"{sums.get(name) or file_sum(folder / name)}  {name}\n" for name in names]
    write_atomically(folder / SUMS, "".join(lines))
    sync(folder)


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, one phrase each; empty if it is as it was written.

    Args:
        folder: the checkpoint.
        part: which share of the files to look at: several ranks read one checkpoint.
        parts: number of shares.
    """
    sums = folder / SUMS
    if not sums.exists():
        return [f"{SUMS} is missing"] if part == 0 else []
    try:
        lines = sums.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    except OSError as error:
        return [f"{SUMS} can't be read ({error})"]
    listed = {line.partition("  ")[2] for line in lines}
    needed = sorted({STATE, *(file.name for pattern in NEEDED for file in folder.glob(pattern))})
    found = [f"{name} isn't listed in {SUMS}" for name in needed if part == 0 and name not in listed]
    for i, line in enumerate(lines):
        if i % parts != part:
            continue
        expected, separator, name = line.partition("  ")
        file = folder / name
        if not separator or not name or Path(name).name != name:
            found.append(f"line {i + 1} of {SUMS} can't be read")
        elif what := _difference(file, expected):
            found.append(f"{name} {what}")
    return found


def find_damage_beside(folder: Path) -> list[str]:
    """What is wrong with files that a checkpoint needs to go on and that lie elsewhere in the run's folder.

    The state of each hook lists them: `sums`, from a path within the run's folder to its SHA-256.

    Args:
        folder: a checkpoint in which `find_damage` finds nothing.
    """
    run_dir, hooks = folder.parent.parent, read_state(folder).get("hooks", {})
    sums = {name: total for state in hooks.values() for name, total in state.get("sums", {}).items()}
    return [f"{name} {what}" for name, total in sums.items() if (what := _difference(run_dir / name, total))]


def _difference(file: Path, expected: str) -> str | None:
    """How a file differs from the one whose SHA-256 is given."""
    try:
        if not file.is_file():
            return "is missing"
        if file_sum(file) != expected:
            return f"is not what was written (its SHA-256 differs, {file.stat().st_size:,} bytes)"
    except OSError as error:
        return f"can't be read ({error})"
    return None


def commit(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Give a whole checkpoint its name, let `latest` name it, and remove what is no longer kept.

    Args:
        folder: the checkpoint's name to be; it lies at `temporary_folder(folder)`.
        keep_last: newest checkpoints kept.
        keep_every: those of steps that are multiples of it are kept too.
    """
    shutil.rmtree(folder, ignore_errors=True)  # the one of an earlier attempt, damaged or left behind by a step back
    temporary_folder(folder).replace(folder)
    sync(folder.parent)
    write_atomically(folder.parent / "latest", folder.name + "\n")
    earlier = [old for old in _named_folders(folder.parent) if _step_of(old) <= _step_of(folder)]
    for old in earlier[:-keep_last]:
        if keep_every is None or _step_of(old) % keep_every:
            _remove(old)


def _remove(old: Path) -> None:
    """Remove a checkpoint that is no longer kept; if it can't be, that is no reason to end the run."""
    try:
        going = old.rename(temporary_folder(old))  # not half a checkpoint if it ends here; the next one makes way
        shutil.rmtree(going)
    except OSError as error:
        print(f"warning: {old}, which is no longer kept, can't be removed: {error}", file=sys.stderr, flush=True)
