"""What the documents name exists: commands, flags, configs and overrides, make targets, paths, imports, messages, links."""

import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_conan.config import RunConfig, check_config, load_config
from megatron_conan.config.load import _field_names

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".", "docs", "data_tools", "kernels/*")
DOCUMENTS = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/*.md"))]
SHELL_COMMANDS = {"source", "cd", "git", "ls", "cat", "tail"}
"""Commands that are not ours to check."""
TOP_FOLDERS = ("megatron_conan", "benchmarks", "configs", "data_tools", "docs", "launch", "kernels", "tests", ".ci")
STAGES = ("pretrain", "sft", "weak", "finetune")


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for path in sorted(DOCUMENTS):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if match[1] in languages:
                found.append(Block(path, text[: match.start()].count("\n") + 1, match[1], match[2]))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """Words of every command of a shell block, without comments, continued lines joined, leading assignments dropped."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


@functools.cache
def help_text(*command: str) -> str:
    result = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)} --help: {result.stderr}"
    return result.stdout


@functools.cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_flags(words: list[str], known: str) -> None:
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            assert re.search(rf"{re.escape(flag)}\b", known), f"{flag} is no option"


def check_launch(script: str, words: list[str], num_processes: int | None) -> None:
    """`launch/STAGE.sh --config FILE [section.key=value ...]` must load, fit its ranks, and be of its stage."""
    stage = Path(script).stem
    assert (ROOT / script).is_file()
    assert stage in STAGES
    config_file = f"configs/conan_1.4b/{stage}.yaml"
    if words and words[0] == "--config":
        config_file, words = words[1], words[2:]
    assert not [word for word in words if word.startswith("-")]
    config = load_config(ROOT / config_file, words)
    assert config.stage == stage
    if num_processes is not None:
        check_config(config, num_processes)


def check_command(words: list[str]) -> None:
    name = words[0].removeprefix(".venv/bin/")
    if name == "make":
        for word in words[1:]:
            assert "=" in word or word in make_targets(), f"make {word}"
    elif name == "torchrun":
        place = next(i for i, word in enumerate(words) if word.endswith(".sh"))
        options = words[1:place]
        assert {word for word in options if word.startswith("--")} <= {
            "--standalone", "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"
        }  # fmt: skip
        nodes = int(options[options.index("--nnodes") + 1]) if "--nnodes" in options else 1
        check_launch(words[place], words[place + 1 :], nodes * int(options[options.index("--nproc-per-node") + 1]))
    elif name == "bash":
        check_launch(words[1], words[2:], None)
    elif name == "python" and words[1:3] == ["-P", "-m"]:
        check_flags(words[4:], help_text(sys.executable, *words[1:4]))
    elif name == "python":
        assert (ROOT / words[1]).is_file()
        check_flags(words[2:], help_text(sys.executable, words[1]))
    elif name == "conan":
        check_flags(words[2:], help_text(sys.executable, "-m", "megatron_conan.cli", words[1]))
        if words[1] == "plan":
            options = dict(zip(words[2::2], words[3::2], strict=False))
            check_config(load_config(ROOT / options["--config"]), int(options.get("--world-size", "1")))
    elif name == "pytest":
        options = dict(zip(words[1::2], words[2::2], strict=False)) if words[1] in ("-m", "-k") else {}
        assert set(options) <= {"-m", "-k", words[-1]}
        assert all((ROOT / word).exists() for word in (words[-1:] if options else words[1:]))
        if "-k" in options:
            texts = [path.read_text(encoding="utf-8") for path in (ROOT / words[-1]).glob("test_*.py")]
            assert any(f"def test_{options['-k']}" in text for text in texts), f"no test of {options['-k']}"
    elif name == "compute-sanitizer":
        assert words[1] == "--tool"
        assert words[2] in {"memcheck", "racecheck", "synccheck", "initcheck"}
        check_command(words[3:])
    else:
        assert name in SHELL_COMMANDS, f"unknown command {name}"


@pytest.mark.parametrize("block", blocks("bash", "sh"), ids=str)
def test_commands_are_valid(block):
    for words in commands(block.text):
        check_command(words)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_parse_and_what_they_import_exists(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def test_cheap_commands_run():
    plan = "conan plan --config configs/conan_1.4b/pretrain.yaml --world-size 64"
    assert plan in (ROOT / "README.md").read_text()
    command = [sys.executable, "-m", "megatron_conan.cli", *shlex.split(plan)[1:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "1,499,205,120" in result.stdout


def test_launchers_differ_in_the_stage_alone():
    texts = {stage: (ROOT / f"launch/{stage}.sh").read_text() for stage in STAGES}
    assert len({text.replace(stage, "STAGE") for stage, text in texts.items()}) == 1
    ast.parse(texts["weak"])


def test_a_launcher_started_with_bash_reaches_the_python_half():
    command = ["bash", "launch/weak.sh", "--config", "no-such.yaml"]
    environment = {**os.environ, "NPROC": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "error: config file no-such.yaml does not exist" in result.stderr


def inline_code(path: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_paths_make_targets_and_keys_exist(path):
    for code in inline_code(path):
        first = code.split()[0]
        top = first.split("/")[0]
        beside = path.parent != ROOT and (path.parent / top).is_dir()  # a path from the document's own folder on
        if (top in TOP_FOLDERS or beside) and "/" in first:
            place = re.sub(r"[,;]$", "", first)
            folder = path.parent if beside else ROOT
            assert list(folder.glob(place.rstrip("/"))) or "STAGE" in place, f"{path.name}: {place} does not exist"
        if re.match(r"(?:[A-Z]+=\S+ )?make [a-z]", code):
            check_command(next(commands(code)))
        key = re.fullmatch(r"([a-z_]+)\.([a-z_0-9]+)(?:=.*)?", code)
        if key and key[1] in RunConfig.model_fields:
            assert key[2] in _field_names([key[1]]), f"{path.name}: {code} is no config key"


def slug(heading: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.is_file(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{path.name}: {target}"


@functools.cache
def messages() -> str:
    """All text constants of the package, those of an f-string apart."""
    constants = []
    for file in [*(ROOT / "megatron_conan").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.append(node.value)
            elif isinstance(node, ast.AnnAssign):
                constants.append(ast.unparse(node.target))  # a field of a report is found under its name
    return "\0".join(constants)


def test_messages_of_troubleshooting_are_those_of_the_code():
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"\*\*([^*]+)\*\*", text)
    assert len(quoted) > 20
    for message in quoted:
        assert message in messages(), f"no message says {message!r}"


def test_no_machine_or_host_is_named():
    for path in [*DOCUMENTS, ROOT / "Makefile", ROOT / "constraints.txt", ROOT / ".ci/run"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(?:root|home|work)/|https?://(?!github\.com|arxiv\.org)", text), path
