"""A run is a folder: config.yaml, environment.json, metrics.jsonl, tensorboard/, checkpoints/, negatives/, evaluation/."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_conan.config import RunConfig, dump_config, parse_config, resume_differences
from megatron_conan.data.fingerprint import data_fingerprints

RECORDED_PACKAGES = (
    "megatron-conan",
    "torch",
    "megatron-core",
    "numpy",
    "sentencepiece",
    "faiss-cpu",
    "faiss-gpu",
    "mteb",
)
NUMERIC_PACKAGES = ("torch", "megatron-core", "numpy", "faiss-cpu", "faiss-gpu")
"""Those of another version of which a run's numbers may differ."""


class WriteError(OSError):
    """Something of a run could not be written; says what, why and what to do."""

    def __init__(self, what: object, folder: Path, error: object) -> None:
        """`folder` is one that is there, on the same file system."""
        free = shutil.disk_usage(folder).free / 2**20
        super().__init__(
            f"{what} could not be written: {error} ({free:,.1f} MiB are free there). Make room, then start the same command "
            "again: it goes on from the last checkpoint"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """The body writes `path`. Raises WriteError if there is no room on the disk, or in a quota."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, None):  # None: numpy, which wrote less than it was to
            raise WriteError(path, path.parent, error) from error
        raise


def write_atomically(file: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: it is whole or not there, after a power cut too.

    Raises:
        WriteError: if there is no room; nothing is left then.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with writing(file), temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def check_run_folder(config: RunConfig) -> None:
    """Refuse a run folder that holds another config. Reads only; any rank may call.

    Raises:
        ValueError: with the differing keys and the remedy.
    """
    file = config.run_dir / "config.yaml"
    if not file.exists():
        return
    differences = resume_differences(read_config(config.run_dir), config)
    if differences:
        raise ValueError(
            f"{config.run_dir} holds a run with another config and can't be resumed with this one: "
            + "; ".join(differences)
            + ". Give another run_dir, or remove the folder"
        )


def read_config(run_dir: Path) -> RunConfig:
    """The config saved with a run. Raises ValueError if the folder holds no run."""
    file = run_dir / "config.yaml"
    if not file.exists():
        raise ValueError(f"{run_dir} is not a run folder: {file} does not exist")
    return parse_config(yaml.safe_load(file.read_text(encoding="utf-8")), origin=str(file))


def open_run_folder(config: RunConfig, world_size: int) -> None:
    """Create the folder and write the resolved config, git commit, versions and the data's fingerprints. Rank 0 only.

    A run that goes on tells first what is different now and allowed to be, but moves its numbers.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    versions = _versions()
    if any((config.run_dir / "checkpoints").glob("step_*")):
        for line in [*_moved_schedules(config), *_changed_versions(config.run_dir, versions)]:
            print(f"warning: {line}", file=sys.stderr, flush=True)
    write_atomically(config.run_dir / "config.yaml", dump_config(config))
    environment = {
        "commit": _git_commit(),
        "world_size": world_size,
        "versions": versions,
        "data": data_fingerprints(config),
    }
    write_atomically(config.run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")


def _moved_schedules(config: RunConfig) -> list[str]:
    """A line if schedules end at another step than before."""
    if not (config.run_dir / "config.yaml").exists():
        return []
    before, now = read_config(config.run_dir).train.steps, config.train.steps
    scheduled = []
    if config.optimizer.decay != "constant" or config.optimizer.warmup_fraction > 0:
        scheduled.append("the learning rate")
    if config.is_contrastive and config.soft_mask.schedule != "constant":
        scheduled.append("the opening of the soft mask")
    if before == now or not scheduled:
        return []
    return [
        f"train.steps: {before} -> {now}: {' and '.join(scheduled)} now {'follow' if len(scheduled) > 1 else 'follows'} a "
        f"schedule that ends at step {now}, with a jump at the next step"
    ]


def _changed_versions(run_dir: Path, now: dict[str, Any]) -> list[str]:
    """A line if packages that numbers depend on have other versions than when the run was last started."""
    file = run_dir / "environment.json"
    before = json.loads(file.read_text(encoding="utf-8"))["versions"] if file.exists() else now
    changes = [
        f"{package} {before.get(package, 'absent')} -> {now.get(package, 'absent')}"
        for package in NUMERIC_PACKAGES
        if before.get(package) != now.get(package)
    ]
    return (
        [f"versions changed since this run last started: {', '.join(changes)}; its numbers may too"] if changes else []
    )


def _git_commit() -> str | None:
    folder = Path(__file__).parent
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None if result.returncode == 0 else None


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
