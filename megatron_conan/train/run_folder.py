"""A run is a folder: config.yaml, environment.json, metrics.jsonl, tensorboard/, checkpoints/, negatives/, evaluation/."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from megatron_conan.config import RunConfig, dump_config, parse_config, resume_differences

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


def write_atomically(file: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: it is whole or not there, after a power cut too."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


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
    """Create the folder and write the resolved config, git commit and versions. Rank 0 only."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(config.run_dir / "config.yaml", dump_config(config))
    environment = {"commit": _git_commit(), "world_size": world_size, "versions": _versions()}
    write_atomically(config.run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")


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
