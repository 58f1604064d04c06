"""From YAML file and `section.key=value` words to a checked `RunConfig`, and back to YAML."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_conan.config.tree import RunConfig

MAY_DIFFER_ON_RESUME = (
    "parallel",
    "checkpoint",
    "watchdog",
    "profile",
    "run_dir",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.steps",
    "train.log_every",
    "train.max_skipped_steps",
    "train.dry_run",
    "train.peak_tflops",
    "attention.backend",
    "mining.max_tokens",
    "mining.scratch_dir",
    "mining.gpu_memory_gib",
)
"""Keys (or whole sections) that a resumed run may change; any other difference is refused."""


def load_config(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a stage's YAML, merge its `base:` files, apply `section.key=value` words, and validate.

    Args:
        file: YAML file; its `base:` (a path, or a list of them, relative to the file) is merged below it.
        overrides: words `section.key=value`; values are parsed as YAML.

    Raises:
        ValueError: naming the file or word, the key, and for unknown keys the nearest known one.
    """
    tree = read_tree(file)
    for word in overrides:
        _apply_override(tree, word)
    return parse_config(tree, origin=str(file))


def parse_config(tree: dict[str, Any], origin: str) -> RunConfig:
    """Validate a plain tree. Raises ValueError with one line a problem; `origin` says where the tree came from."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(tree, item) for item in error.errors()]
        raise ValueError(f"{origin}: " + "; ".join(lines)) from None


def read_tree(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file as a plain tree with its `base:` files merged below it (keys of the file win).

    Raises:
        ValueError: for a file that is missing, not text, not YAML, or whose `base:` leads back to itself (`above`).
    """
    if file.resolve() in above:
        raise ValueError(f"{file}: base leads back to this file; a config can't build on itself")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {file} can't be read as text: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: a mapping of sections is expected at the top level")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{file}: base={bases!r} must be the path of a YAML file, or a list of them")
    merged: dict[str, Any] = {}
    for base in bases:
        _merge(merged, read_tree(file.parent / base, (*above, file.resolve())))
    _merge(merged, tree)
    return merged


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML text; `parse_config(yaml.safe_load(text))` gives it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def resume_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Keys in which two configs differ and must not on resume, as lines `key: old -> new`."""
    differences = list(_differences(old.model_dump(mode="json"), new.model_dump(mode="json")))
    limited = [f"data.sources.{i}" for i, source in enumerate(new.data.sources) if source.max_epochs is not None]
    if limited and old.train.steps != new.train.steps:
        differences.append(
            f"train.steps: {old.train.steps} -> {new.train.steps}, on which the shares of sources depend with max_epochs "
            f"({', '.join(limited)})"
        )
    return differences


def _differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Of the smallest parts that differ: `data.sources.1.weight`, but `mining` where one side has no such section."""
    if any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_DIFFER_ON_RESUME):
        return
    parts = _parts(before), _parts(after)
    if parts[0] is not None and parts[1] is not None:
        for name in sorted(parts[0].keys() | parts[1].keys()):
            yield from _differences(parts[0].get(name), parts[1].get(name), f"{key}.{name}".lstrip("."))
    elif before != after:
        yield f"{key}: {_shown(before)} -> {_shown(after)}"


def _parts(value: Any) -> dict[str, Any] | None:
    """A section's fields, or a list of sections by number; None for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(i): item for i, item in enumerate(value)}
    return None


def _shown(value: Any) -> str:
    """A value as in an error message: of a section what is set."""
    if isinstance(value, dict):
        return repr({name: item for name, item in value.items() if item is not None})
    return repr(value)


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _apply_override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ValueError(f"{word!r}: an override is written section.key=value, for example train.steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{word!r}: the value is not valid YAML: {error}") from None
    if isinstance(value, str):
        value = _as_float(value)
    node: Any = tree
    *sections, leaf = key.split(".")
    for name in sections:
        node = _child(node, name, word)
    if isinstance(node, list):
        node[_index(node, leaf, word)] = value
    else:
        node[leaf] = value


def _child(node: Any, name: str, word: str) -> Any:
    """The section (made if absent) or list that `name` leads to."""
    if isinstance(node, list):
        return node[_index(node, name, word)]
    if node.get(name) is None:
        node[name] = {}
    if not isinstance(node[name], dict | list):
        raise ValueError(f"{word!r}: {name!r} is not a section")
    return node[name]


def _index(node: list[Any], name: str, word: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ValueError(f"{word!r}: {name!r} must be a number from 0 to {len(node) - 1}: a list stands there")
    return int(name)


def _as_float(text: str) -> str | float:
    """YAML 1.1 reads `1e-3` as a string; people mean a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _explain(tree: dict[str, Any], item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        known = _field_names(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*path[:-1], near[0]])}?" if near else ""
        return f"unknown key {key}{hint}"
    if item["type"] == "missing":
        return f"{key} is required and missing"
    return f"{key}={item['input']!r}: {item['msg']}"


def _field_names(path: list[str]) -> list[str]:
    """Names of the fields of the section that `path` leads to."""
    model: type[BaseModel] = RunConfig
    for name in path:
        if name.isdigit():
            continue
        annotation = model.model_fields[name].annotation
        found = next(_models_in(annotation), None)
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) is not None or isinstance(annotation, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)
