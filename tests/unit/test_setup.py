"""Packaging: every package of the tree is installed, every requirement is pinned, make finds what it needs."""

import re
import runpy
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", seen.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return seen


@pytest.fixture
def pins() -> dict[str, Requirement]:
    """Normalised name -> line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    names = [normal(pin.name) for pin in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_setup_lists_every_package_of_the_tree(arguments):
    tree = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("megatron_conan", "kernels")
        for path in (ROOT / top).rglob("__init__.py")
    }
    installed = {re.sub(r"^kernels", "megatron_conan.kernels", name) for name in tree}
    assert set(arguments["packages"]) == installed
    assert arguments["package_dir"] == {"megatron_conan.kernels": "kernels"}
    modules = {path.parent for top in ("megatron_conan", "kernels") for path in (ROOT / top).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in modules)


def test_the_kernels_of_other_packages_are_not_shadowed(tmp_path):
    """Hugging Face has a package `kernels`, which transformers imports: ours must not come up under that name."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert str(ROOT) not in found.replace(str(ROOT / ".venv"), "")


def test_constraints_are_exact_and_portable(pins):
    for pin in pins.values():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert "+" not in specifier.version
        assert pin.url is None
    assert str(pins["torch"]) == "torch==2.13.0"
    assert "megatron-conan" not in pins


def test_constraints_pin_every_requirement_within_its_range(arguments, pins):
    extras = [requirement for extra in arguments["extras_require"].values() for requirement in extra]
    for text in [*arguments["install_requires"], *extras]:
        requirement = Requirement(text)
        (specifier,) = pins[normal(requirement.name)].specifier
        assert requirement.specifier.contains(specifier.version), f"{text} against {specifier}"


def test_constraints_pin_what_the_requirements_require(pins):
    """The closure: the needs of every pinned package that is installed here are pinned too."""
    needed = set()
    for name in pins:
        try:
            needs = requires(name) or []
        except ModuleNotFoundError:
            continue  # of the gpu extra
        needed |= {
            normal(n.name) for n in map(Requirement, needs) if n.marker is None or n.marker.evaluate({"extra": ""})
        }
    # the CUDA build of torch pins its own libraries exactly
    assert not {name for name in needed - set(pins) if not name.startswith(("nvidia-", "triton", "cuda-"))}


def test_the_console_script_and_version(arguments):
    assert arguments["entry_points"] == {"console_scripts": ["conan = megatron_conan.cli:main"]}
    assert arguments["version"] == version("megatron_conan")


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_make_without_a_target_lists_the_targets():
    listed = make().stdout
    for target in ("install", "demo", "test", "lint"):
        assert re.search(rf"^{target} ", listed, re.MULTILINE)


def test_make_test_is_one_pytest_process():
    commands = make("-n", "test").stdout
    assert commands.count("-m pytest") == 1
    assert commands.rstrip().splitlines()[-1].startswith(".venv/bin/python -P -m pytest -q ")


def test_the_short_demo_is_passed_on():
    assert make("-n", "demo", "DEMO=short").stdout.rstrip().endswith("launch/demo.py --size short")


def test_an_interpreter_that_cannot_serve_is_explained_in_one_line(tmp_path):
    tree = tmp_path / "checkout"
    tree.mkdir()
    for name in ("Makefile", "setup.py", "constraints.txt"):
        (tree / name).write_bytes((ROOT / name).read_bytes())

    def refusal(python: str) -> str:
        result = subprocess.run(
            ["make", "install", f"PYTHON={python}"], cwd=tree, capture_output=True, text=True, check=False
        )
        assert result.returncode != 0
        return result.stderr.splitlines()[0]

    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\npython3 -c 'import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])' \"$2\"\n")
    old.chmod(0o755)
    assert refusal(str(old)) == f"error: {old} is Python 3.9; 3.11 or newer is needed: make install PYTHON=python3.12"
    bare = tmp_path / "bare-python"
    bare.write_text('#!/bin/sh\npython3 -c \'import sys; sys.modules["ensurepip"] = None; exec(sys.argv[1])\' "$2"\n')
    bare.chmod(0o755)
    assert refusal(str(bare)) == f"error: {bare} can make no virtual environment: apt install python3-venv"
    assert refusal("no-such-python").startswith("error: no-such-python not found")
    assert not (tree / ".venv").exists()
