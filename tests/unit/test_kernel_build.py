"""The build of the kernels: what ptxas reports, what fails, and what a failure leaves behind. A stand-in plays nvcc."""

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_conan.kernels.soft_mask_attention import build, library, resources

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9soft_mask14forward_kernelI13__nv_bfloat16Li112ELb0EEEvNS_13ForwardParamsEi' for 'sm_80'
ptxas info    : Function properties for _ZN9soft_mask14forward_kernelI13__nv_bfloat16Li112ELb0EEEvNS_13ForwardParamsEi
    120 bytes stack frame, 120 bytes spill stores, 124 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 120 bytes cumulative stack size, 564 bytes cmem[0]
ptxas info    : Compile time = 202.449 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9soft_mask14forward_kernelI6__halfLi64ELb1EEEvNS_13ForwardParamsEi' for 'sm_90'
ptxas info    : Function properties for _ZN9soft_mask14forward_kernelI6__halfLi64ELb1EEEvNS_13ForwardParamsEi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 236 registers, used 1 barriers
ptxas info    : Compile time = 105.963 ms
ptxas info    : Compiling entry function '_Z4plainPf' for 'sm_90'
ptxas info    : Function properties for _Z4plainPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 2 barriers, 2048 bytes smem
"""  # noqa: E501  as nvcc 13.0.88 printed it, the last kernel apart
GOOD = resources.Resources("forward fp16 d64 columns", "sm_90", 236, 36864, 1, 0, 0, 0)


def test_report_of_ptxas_is_read():
    assert resources.parse_ptxas(REPORT) == [
        resources.Resources("forward bf16 d112 rows", "sm_80", 255, 0, 1, 120, 120, 124),
        resources.Resources("forward fp16 d64 columns", "sm_90", 236, 0, 1, 0, 0, 0),
        resources.Resources("_Z4plainPf", "sm_90", 10, 2048, 2, 0, 0, 0),
    ]


def test_functions_that_a_kernel_calls_count_as_its_own():
    lines = REPORT.splitlines()
    lines[4:4] = ["    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads"]
    (row, *_) = resources.parse_ptxas("\n".join(lines))
    assert (row.stack, row.spill_stores, row.spill_loads) == (128, 124, 126)


def test_table_is_read_as_it_is_written():
    rows = resources.add_dynamic_shared(
        resources.parse_ptxas(REPORT)[:2], {"forward bf16 d112": 61440, "forward fp16 d64": 36864}
    )
    text = resources.write_table(reversed(rows), "13.0.88")
    assert resources.read_table(text) == ("13.0.88", rows)
    assert len({len(line) for line in text.splitlines() if not line.startswith("#")}) == 1
    assert rows[1] == GOOD
    shared = {"forward fp16 d64": 36864}
    assert resources.add_dynamic_shared([replace(GOOD, shared=1024)], shared)[0].shared == 37888  # static and dynamic
    kernels = [replace(GOOD, kernel=f"forward {name}") for name in ("bf16 d64", "bf16 d112", "fp16 d64")]
    assert resources.in_order(kernels[::-1]) == kernels  # by numbers as numbers


def compare(row: resources.Resources, version: str = "13.0.88") -> tuple[list[str], list[str]]:
    return resources.compare([row], version, resources.write_table([GOOD], "13.0.88"))


def test_more_than_is_recorded_fails():
    assert compare(GOOD) == ([], [])
    for changes, message in (
        (
            {"registers": 240},
            "forward fp16 d64 columns sm_90 takes 240 registers, recorded 236; if that is meant, record it",
        ),
        (
            {"shared": 40960},
            "forward fp16 d64 columns sm_90 takes 40960 bytes of shared memory, recorded 36864; if that",
        ),
        (
            {"spill_stores": 8, "spill_loads": 4},
            "forward fp16 d64 columns sm_90 keeps registers in memory: 0 bytes of stack",
        ),
        ({"stack": 16}, "keeps registers in memory: 16 bytes of stack, 0 bytes of spill stores and 0 of spill loads"),
    ):
        (error,), _ = compare(replace(GOOD, **changes))
        assert message in error
    assert "--update-resources" in resources.REMEDY
    errors, _ = compare(replace(GOOD, kernel="forward fp16 d80 columns"))
    assert [error.partition(":")[0] for error in errors] == ["recorded but not built", "built but not recorded"]
    assert resources.compare([GOOD], "13.0.88", "")[0] == [f"nothing is recorded; {resources.REMEDY}"]


def test_another_nvcc_may_take_more_registers_but_not_spill():
    errors, remarks = compare(replace(GOOD, registers=240), "12.4.1")
    assert not errors
    assert remarks == ["forward fp16 d64 columns sm_90 takes 240 registers, recorded with nvcc 13.0.88: 236"]
    assert compare(replace(GOOD, stack=8), "12.4.1")[0]


def test_cuda_versions_must_fit():
    nvcc = build.Compiler(Path("/opt/cuda/bin/nvcc"), "13.0.88")
    for torch_cuda, driver in ((None, None), ("13.2", None), ("13.0", "13.1"), (None, "14.0")):
        build.check_versions(nvcc, torch_cuda, driver)
    with pytest.raises(
        build.BuildError, match=r"of CUDA 12.8: set CUDA_HOME to a toolkit of CUDA 12, or install a torch"
    ):
        build.check_versions(nvcc, "12.8", "13.0")
    with pytest.raises(build.BuildError, match=r"the driver runs up to CUDA 12.4: update the driver, or set CUDA_HOME"):
        build.check_versions(nvcc, None, "12.4")


def test_a_missing_nvcc_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", "")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", tmp_path)
    assert build.main([]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: no nvcc in $CUDA_HOME/bin, $CUDA_PATH/bin, on PATH or in ")
    assert "install the CUDA toolkit" in line


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A toolkit whose nvcc writes its arguments to `calls`, makes every output, and obeys a file `fail`."""
    toolkit = tmp_path / "toolkit"
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"""#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi
echo "$@" >> {toolkit}/calls
if [ -e {toolkit}/fail ]; then echo "forward.cu(7): error: no such thing"; exit 2; fi
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in ("forward.cu", "forward.cuh", "op.cpp", "params.h"):
        (sources / name).write_text(name)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "driver_version", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(build, "load_and_ask", lambda library: {})
    monkeypatch.setattr(build, "check_resources", lambda rows, nvcc, update: None)
    return toolkit


def build_in(folder: Path) -> None:
    build.build(library=folder / "libsoft_mask_attention.so", objects=folder / "objects")


def calls(toolkit: Path) -> list[str]:
    """What nvcc was called for since the last time this was asked."""
    file = toolkit / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return sorted("link" if "-shared" in line.split() else line.split(" -c ")[1].split()[0] for line in lines)


def test_only_what_has_changed_is_compiled(stand_in, tmp_path, capsys):
    build_in(tmp_path)
    assert calls(stand_in) == [*["forward.cu"] * 6, "link", "op.cpp"]
    capsys.readouterr()
    build_in(tmp_path)
    assert calls(stand_in) == []
    assert capsys.readouterr().out.endswith("libsoft_mask_attention.so is up to date\n")
    (tmp_path / "csrc" / "op.cpp").write_text("changed")
    build_in(tmp_path)
    assert calls(stand_in) == ["link", "op.cpp"]
    (tmp_path / "csrc" / "forward.cuh").write_text("changed")
    build_in(tmp_path)
    assert calls(stand_in) == [*["forward.cu"] * 6, "link"]
    (tmp_path / "csrc" / "params.h").write_text("changed")
    build_in(tmp_path)
    assert calls(stand_in) == [*["forward.cu"] * 6, "link", "op.cpp"]
    (tmp_path / "libsoft_mask_attention.so").unlink()
    build_in(tmp_path)
    assert calls(stand_in) == ["link"]


def test_another_compiler_torch_or_flag_compiles_again(stand_in, tmp_path, monkeypatch):
    build_in(tmp_path)
    assert calls(stand_in) == (everything := [*["forward.cu"] * 6, "link", "op.cpp"])
    nvcc = stand_in / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("13.0.88", "13.0.99"))
    build_in(tmp_path)
    assert calls(stand_in) == everything
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    build_in(tmp_path)
    assert calls(stand_in) == ["link", "op.cpp"]
    monkeypatch.setattr(build, "COMPILE", (*build.COMPILE, "-lineinfo"))
    build_in(tmp_path)
    assert calls(stand_in) == everything
    flags = build.link_flags(tmp_path)
    monkeypatch.setattr(build, "link_flags", lambda folder: [*flags, "-s"])
    build_in(tmp_path)
    assert calls(stand_in) == ["link"]


def test_a_lost_object_is_compiled_again(stand_in, tmp_path):
    build_in(tmp_path)
    calls(stand_in)
    for lost in (tmp_path / "objects" / "op.o", tmp_path / "libsoft_mask_attention.so"):
        lost.unlink()
    build_in(tmp_path)
    assert calls(stand_in) == ["link", "op.cpp"]


@pytest.mark.parametrize("text", ["", '{"key": "a8', "[]"])
def test_notes_that_an_interrupted_build_left_are_not_believed(text, stand_in, tmp_path):
    build_in(tmp_path)
    calls(stand_in)
    for note in (tmp_path / "objects" / "op.json", tmp_path / "libsoft_mask_attention.json"):
        note.write_text(text)
    assert library.read_stamp(tmp_path / "libsoft_mask_attention.so") == {}
    build_in(tmp_path)
    assert calls(stand_in) == ["link", "op.cpp"]
    assert library.read_stamp(tmp_path / "libsoft_mask_attention.so")["nvcc"] == "13.0.88"
    assert not [path for path in tmp_path.rglob("*") if f".{os.getpid()}." in path.name]


def test_where_nothing_can_be_written_one_line_says_so(stand_in, tmp_path, monkeypatch, capsys):
    objects = tmp_path / "objects"
    objects.write_text("a file in the way")
    monkeypatch.setattr(build.build, "__defaults__", (False, tmp_path / "libsoft_mask_attention.so", objects))
    assert build.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: [Errno 17] File exists: '{objects}'"


def test_resources_are_recorded_of_a_library_that_is_up_to_date(stand_in, tmp_path, monkeypatch):
    build_in(tmp_path)
    updates = []
    monkeypatch.setattr(build, "check_resources", lambda rows, nvcc, update: updates.append(update))
    build.build(True, library=tmp_path / "libsoft_mask_attention.so", objects=tmp_path / "objects")
    assert updates == [True]


def test_warnings_are_shown(stand_in, tmp_path, capsys):
    nvcc = stand_in / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text() + "echo 'op.cpp(7): warning: declared and never used'\n")
    build_in(tmp_path)
    assert "op.cpp(7): warning: declared and never used" in capsys.readouterr().out


def test_a_failing_build_leaves_the_library_that_was_there(stand_in, tmp_path, monkeypatch):
    build_in(tmp_path)
    file = tmp_path / "libsoft_mask_attention.so"
    stamp = library.read_stamp(file)
    file.write_text("the old one")
    (tmp_path / "csrc" / "forward.cuh").write_text("changed")
    (stand_in / "fail").touch()
    with pytest.raises(build.BuildError, match=r"compiling forward .* fails \(exit status 2\):") as failure:
        build_in(tmp_path)
    assert str(failure.value).count("no such thing") == 1
    (stand_in / "fail").unlink()

    def refuse(rows: object, nvcc: object, update: object) -> None:
        raise build.BuildError("too many registers")

    monkeypatch.setattr(build, "check_resources", refuse)
    with pytest.raises(build.BuildError, match="too many registers"):
        build_in(tmp_path)
    assert file.read_text() == "the old one"
    assert library.read_stamp(file) == stamp != build.stamp("13.0.88")
    assert {path.name for path in tmp_path.glob("lib*")} == {file.name, library.stamp_file(file).name}


def test_spills_are_not_recorded(monkeypatch, tmp_path, capsys):
    nvcc = build.Compiler(Path("/opt/cuda/bin/nvcc"), "13.0.88")
    monkeypatch.setattr(resources, "RECORD", tmp_path / "resources.txt")
    with pytest.raises(build.BuildError, match="forward fp16 d64 columns sm_90 keeps registers in memory"):
        build.check_resources([replace(GOOD, spill_loads=4)], nvcc, update=True)
    assert not resources.RECORD.exists()
    build.check_resources([GOOD], nvcc, update=True)
    build.check_resources([GOOD], nvcc, update=False)
    with pytest.raises(build.BuildError, match="takes 250 registers"):
        build.check_resources([replace(GOOD, registers=250)], nvcc, update=False)


def test_digests_tell_names_and_contents_apart(tmp_path):
    found = set()
    for number, files in enumerate(
        ({"a": "xy", "b": ""}, {"a": "x", "b": "y"}, {"a": "xy", "c": ""}, {"ax": "y", "b": ""})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        patterns = ("a*", "b*", "c*")
        digests = {library.source_digest(folder, x) for x in (("*",), patterns, patterns[::-1], ("*", "a*"))}
        assert len(digests) == 1
        found |= digests
    assert len(found) == 4


def test_the_driver_is_asked_without_a_gpu():
    version = build.driver_version()
    assert version is None or float(version) > 8


@pytest.mark.parametrize(
    ("code", "number", "version"), [(0, 13010, "13.1"), (0, 12040, "12.4"), (0, 0, None), (999, 13000, None)]
)
def test_the_drivers_version_is_read(code, number, version, monkeypatch):
    def ask(place):
        place._obj.value = number
        return code

    monkeypatch.setattr(build.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=ask))
    assert build.driver_version() == version


def test_make_kernels_is_the_build():
    root = Path(__file__).resolve().parents[2]
    command = ["make", "--no-print-directory", "-n", "kernels"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout
    assert listed.rstrip().endswith(".venv/bin/python -P -m megatron_conan.kernels.soft_mask_attention.build")
