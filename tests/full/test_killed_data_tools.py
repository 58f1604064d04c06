"""Data tools that are killed, told to end, hindered or crossed, and started again, end with the bytes of a run that was not."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killed_runs import SECONDS_TO_END, Job, documents, is_alive, pairs, wait_until
from tool_inputs import content_of, outputs, rejected_of, small_tokenizer

from megatron_conan.data.tokenizer import Tokenizer

pytestmark = pytest.mark.full

KEPT = re.compile(
    r"What was done is kept in .*/\.out\.partial: the same command goes on with it, --restart drops it\.$"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small.model")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Job]:
    """Some MB in files of all forms, in hundreds of chunks each."""
    folder = tmp_path_factory.mktemp("jobs")
    corpus = [str(path) for path in documents(folder / "documents", 9000, seed=1)]
    more = [str(path) for path in documents(folder / "more", 2000, seed=2)]
    rows = [str(path) for path in pairs(folder / "rows", 3000, 3, "retrieval")]
    classes = [str(path) for path in pairs(folder / "labelled", 6000, 4, "classification")]
    skip = ["--on-error", "skip"]
    made = {}
    for name, tool, options in [
        ("plain", "preprocess", ["--input", *corpus, "--append-eod", *skip]),
        ("dedup", "preprocess", ["--input", *corpus, "--dedup", "--min-tokens", "9", "--max-tokens", "150", *skip]),
        ("pairs", "preprocess_pairs", ["--task", "retrieval", "--input", *rows, "--corpus", *more, *skip]),
        ("classes", "preprocess_pairs", ["--task", "classification", "--input", *classes, *skip]),
    ]:
        own = folder / name
        own.mkdir()
        made[name] = Job(tool, options, tokenizer, own, chunk_bytes=8000)
        made[name].make_expected()
        assert rejected_of(own / "expected" / "out")
    return made


POINTS = {
    "plain": [
        *("worker@30", "part@1", "part@50", "joining@1", "joining@60", "flushed@1", "flushed@70", "half@3", "half@80"),
        *("committed@1", "committed@90", "index@1", "complete@1", "rename@1", "rename@2", "rename@3", "rename@4"),
        *("named@1", "parting@1", "parting@2", "removing@1"),
    ],
    "dedup": [
        *(
            "committed@40",
            "flushed@60",
            "compared@1",
            "records@1",
            "records@4",
            "numbering@1",
            "numbering@2",
            "numbering@3",
        ),
        *("part@1", "joining@50", "committed@200", "index@1", "rename@3"),
    ],
    "pairs": [
        *(
            "rows@1",
            "rows@30",
            "corpus@1",
            "corpus@20",
            "compared@1",
            "numbering@3",
            "part@1",
            "joining@40",
            "joining@130",
        ),
        *(
            "committed@100",
            "flushed@230",
            "index@1",
            "array@1",
            "array@2",
            "array@4",
            "array@7",
            "complete@1",
            "rename@1",
        ),
        *("rename@6", "rename@11", "named@1", "parting@1"),
    ],
    "classes": ["rows@20", "compared@1", "joining@10", "array@1", "array@8", "array@10", "rename@5", "rename@12"],
}


@pytest.mark.parametrize("how", ["self", "group"])
@pytest.mark.parametrize(("name", "point"), [(name, point) for name, points in POINTS.items() for point in points])
def test_killed_at_a_point(jobs: dict[str, Job], tmp_path: Path, name: str, point: str, how: str) -> None:
    """The parent alone, whose workers end by themselves, or all of them; the next run has another number of workers."""
    if point.startswith("worker") and how == "self":
        pytest.skip("the parent of a killed worker lives: another test")
    job = jobs[name]
    many = how == "self" or point.startswith("worker")
    killed, finished = job.check_kill_and_go_on(tmp_path / "out", [(point, how)], workers=(3, 1) if many else (1, 2))
    assert bool(killed.workers()) == many
    begun = killed.notes / "reached"
    assert begun.exists()
    first = point in ("flushed@1", "half@1", "part@1", "joining@1", "rows@1")
    assert finished.went_on or first or point in ("worker@30", "parting@1", "parting@2", "removing@1")


def test_killed_again_and_again(jobs: dict[str, Job], tmp_path: Path) -> None:
    for name, points in POINTS.items():
        prefix = tmp_path / name / "out"
        chain = [
            (point, "group")
            for point in points
            if re.match(r"flushed|committed|half|joining|array|index|rename", point)
        ]
        # the n-th time of a run that goes on comes sooner
        chain = [(re.sub(r"@\d\d+", "@9", point), how) for point, how in chain]
        jobs[name].check_kill_and_go_on(prefix, chain, workers=(2, 1, 3))


@pytest.mark.parametrize("name", POINTS)
def test_killed_at_random_moments(jobs: dict[str, Job], tmp_path: Path, name: str) -> None:
    """Alone and with its group, by turns."""
    job = jobs[name]
    rng = random.Random(name)
    started = time.monotonic()
    job.run(tmp_path / "whole" / "out", workers=2)
    seconds = time.monotonic() - started
    for number in range(5):
        prefix = tmp_path / f"{number}" / "out"
        wait = rng.uniform(0.15, 0.95) * seconds
        process, notes = job.start(prefix, workers=2)
        time.sleep(wait)
        if number % 2:
            os.kill(process.pid, signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)
        killed = job.end(process, notes)
        assert killed.code in (-signal.SIGKILL, 0)
        finished = job.run(prefix, workers=1 + number % 3)
        job.check_finished(finished, prefix)


def test_an_older_output_stays_until_the_new_one_is_whole(jobs: dict[str, Job], tmp_path: Path) -> None:
    """check_killed compares; here there is one, of another task, whose files must be gone in the end."""
    prefix = tmp_path / "out"
    assert jobs["classes"].run(prefix, workers=1, commit=1e9).code == 0
    points = [
        (point, "self") for point in ("rows@9", "joining@9", "array@5", "complete@1", "rename@1", "rename@8", "named@1")
    ]
    jobs["pairs"].check_kill_and_go_on(prefix, points)


@pytest.mark.parametrize("name", ["dedup", "pairs"])
@pytest.mark.parametrize(("how", "code"), [("term", 143), ("int", 130)])
@pytest.mark.parametrize("workers", [1, 2])
def test_told_to_end(jobs: dict[str, Job], tmp_path: Path, name: str, how: str, code: int, workers: int) -> None:
    """Work that was committed is kept; where there is none, nothing is left."""
    job, prefix = jobs[name], tmp_path / "new" / "out"
    run = job.run(prefix, "joining@9", how, workers=workers, commit=1e9)
    assert (run.reached, run.code) == (True, code), run.stderr
    assert "Traceback" not in run.stderr
    if how == "int":
        assert run.stderr.splitlines()[-1] == "error: interrupted. Nothing was written."
    assert list(tmp_path.iterdir()) == []
    run = job.run(prefix, "joining@9", how, workers=workers, commit=0.0)
    assert (run.reached, run.code) == (True, code)
    assert [path.name for path in prefix.parent.iterdir()] == [".out.partial"]
    if how == "int":
        assert run.stderr.splitlines()[-1].startswith("error: interrupted. ")
        assert KEPT.search(run.stderr.strip())
    finished = job.run(prefix, workers=3 - workers)
    assert finished.went_on
    job.check_finished(finished, prefix)


@pytest.mark.parametrize("how", ["term", "int"])
def test_told_to_end_while_workers_start(jobs: dict[str, Job], tmp_path: Path, how: str) -> None:
    """When they are made, while they import, and when they begin to work."""
    for number in range(12):
        process, notes = jobs["plain"].start(tmp_path / "new" / "out", "start@1", "wait", commit=1e9)
        assert wait_until((notes / "reached").exists, 30)
        time.sleep(0.05 * number)
        os.killpg(process.pid, {"term": signal.SIGTERM, "int": signal.SIGINT}[how])
        run = jobs["plain"].end(process, notes)
        assert run.code == {"term": 143, "int": 130}[how]
        assert run.stderr == ("error: interrupted. Nothing was written.\n" if how == "int" else "")
        assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_refused(jobs: dict[str, Job], tmp_path: Path) -> None:
    job, prefix = jobs["plain"], tmp_path / "out"
    process, notes = job.start(prefix, "part@20", "wait")
    assert wait_until((notes / "reached").exists, 30)
    before = content_of(tmp_path)
    for more in ([], ["--restart"], ["--min-tokens", "3"]):
        run = job.run(prefix, more=more)
        assert (run.code, run.stdout) == (2, "")
        assert run.stderr == f"error: another process is writing {prefix}; wait for it, or write to another prefix\n"
    after = content_of(tmp_path)
    # the workers of the first go on writing parts
    assert {name: after[name] for name in before if "part-" not in name} == {
        name: content for name, content in before.items() if "part-" not in name
    }
    (notes / "go").touch()
    job.check_finished(job.end(process, notes), prefix)


def test_another_job_is_refused_until_the_work_is_dropped(jobs: dict[str, Job], tmp_path: Path) -> None:
    job, prefix = jobs["plain"], tmp_path / "out"
    job.check_killed(job.run(prefix, "joining@20"), prefix, {})
    folder = tmp_path / ".out.partial"
    before = content_of(folder)
    message = (
        f"error: {folder} holds an unfinished run with other settings; finish it as it was begun, or add --restart to"
    )
    for more in (["--min-tokens", "3"], ["--dedup"], ["--text-key", "body"], ["--format", "bitext"]):
        run = job.run(prefix, more=more)
        assert run.code == 2
        assert run.stderr.startswith(message) or "lines of text are no parallel rows" in run.stderr
        assert content_of(folder) == before
    run = jobs["dedup"].run(prefix)
    assert run.stderr.startswith(message)
    run = jobs["pairs"].run(prefix)
    assert "unfinished run with other corpus, inputs, makes, settings, task, text_key; finish" in run.stderr
    other = jobs["dedup"].run(prefix, more=["--restart"])
    assert not other.went_on
    jobs["dedup"].check_finished(other, prefix)


def test_work_of_the_same_job_is_dropped_if_asked(jobs: dict[str, Job], tmp_path: Path) -> None:
    for point in ("joining@20", "complete@1", "rename@2"):
        job, prefix = jobs["plain"], tmp_path / point / "out"
        prefix.parent.mkdir()
        job.check_killed(job.run(prefix, point), prefix, {})
        run = job.run(prefix, more=["--restart"])
        assert not run.went_on
        assert run.tokens == job.num_tokens
        job.check_finished(run, prefix)


@pytest.mark.parametrize("name", POINTS)
def test_a_killed_worker_is_told_and_the_next_run_goes_on(jobs: dict[str, Job], tmp_path: Path, name: str) -> None:
    job, prefix = jobs[name], tmp_path / "out"
    run = job.run(prefix, "worker@40", "self", workers=3)
    assert (run.code, run.stdout) == (2, "")
    error = run.stderr.splitlines()[-1]
    assert error.startswith(
        "error: one of 3 tokenising processes was killed, often for lack of memory; use fewer --workers. "
    )
    assert KEPT.search(error)
    assert "Traceback" not in run.stderr
    finished = job.run(prefix, workers=2)
    assert finished.went_on
    job.check_finished(finished, prefix)
    run = job.run(tmp_path / "new" / "out", "worker@40", "self", workers=3, commit=1e9)
    assert run.stderr.endswith("use fewer --workers\n")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", ["grown", "newer", "gone"])
def test_an_input_that_changed_is_refused(tokenizer: Tokenizer, tmp_path: Path, change: str) -> None:
    inputs = documents(tmp_path / "documents", 2000, seed=5)
    (tmp_path / "runs").mkdir()
    options = ["--input", *map(str, inputs), "--on-error", "skip"]
    job, prefix = Job("preprocess", options, tokenizer, tmp_path / "runs", 2000), tmp_path / "out" / "out"
    prefix.parent.mkdir()
    job.check_killed(job.run(prefix, "joining@20"), prefix, {})
    before = content_of(prefix.parent)
    if change == "grown":
        with inputs[0].open("ab") as file:
            file.write(b'\n{"text": "one more"}\n')
    if change == "newer":
        os.utime(inputs[0])
    if change == "gone":
        inputs[0].unlink()
    run = job.run(prefix)
    assert run.code == 2
    expected = (
        "does not exist" if change == "gone" else "holds an unfinished run with other inputs; finish it as it was begun"
    )
    assert expected in run.stderr
    assert run.stderr.count("\n") == 1
    assert content_of(prefix.parent) == before
    if change != "gone":
        assert job.run(prefix, more=["--restart"]).code == 0
        assert ".bin" in outputs(prefix)


def limited(size: int) -> Callable[[], None]:
    """Files of the process can't grow above `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("commit", [0.0, 1e9])
def test_files_that_can_not_grow(jobs: dict[str, Job], tmp_path: Path, name: str, share: float, commit: float) -> None:
    """A full disk as the system tells of it, at different sizes of the largest file."""
    job, prefix = jobs[name], tmp_path / "new" / "out"
    limit = max(400, int(share * max(map(len, job.expected.values()))))  # what it tells stands in a file too
    run = job.run(prefix, workers=1, commit=commit, before=limited(limit))
    check_hindered(job, run.code, run.stderr, prefix)
    finished = job.run(prefix)
    assert finished.went_on == bool(KEPT.search(run.stderr.strip()))
    job.check_finished(finished, prefix)


def check_hindered(job: Job, code: int, stderr: str, prefix: Path) -> None:
    """One line of error; work is kept, or nothing is left."""
    assert code == 2, (code, stderr)
    lines = [line for line in stderr.splitlines() if line.startswith(("error: ", "Traceback", "Exception"))]
    assert len(lines) == 1, stderr
    assert re.match(r"error: .*(File too large|No space left|requested and \d+ written)", lines[0])
    assert stderr.splitlines()[-1] == lines[0]
    if KEPT.search(lines[0]):
        assert [path.name for path in prefix.parent.iterdir()] == [".out.partial"]
    else:
        assert not prefix.parent.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Gives a folder on a disk of so many bytes, and resizes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    is_mounted = False

    def resize(size: int) -> Path:
        nonlocal is_mounted
        how = [f"remount,size={size}"] if is_mounted else [f"size={size}"]
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", *how, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if result.returncode and not is_mounted:
            pytest.skip(f"no disk of its own can be mounted: {result.stderr.decode().strip()}")
        is_mounted = True
        return folder

    yield resize
    if is_mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("commit", [0.0, 1e9])
def test_a_disk_that_fills_up(
    jobs: dict[str, Job], small_disk: Callable[[int], Path], name: str, commit: float
) -> None:
    """At many sizes: wherever it happens it is told in one line, and with more room the next run goes on."""
    job = jobs[name]
    whole = sum(map(len, job.expected.values()))
    for step in range(1, 12):
        folder = small_disk(max(int(whole * step / 6), 1 << 14))
        prefix = folder / "new" / "out"
        run = job.run(prefix, workers=1 + step % 2, commit=commit)
        if run.code == 0:
            assert step > 5
            break
        check_hindered(job, run.code, run.stderr, prefix)
        small_disk(whole * 10)
        finished = job.run(prefix, workers=2)
        assert finished.went_on == bool(KEPT.search(run.stderr.strip()))
        job.check_finished(finished, prefix)
        for path in prefix.parent.iterdir():
            path.unlink()
        prefix.parent.rmdir()
    else:
        pytest.fail("no disk was large enough")


def test_workers_end_with_their_parent_whatever_they_do(jobs: dict[str, Job], tmp_path: Path) -> None:
    """Also where they wait for work."""
    job = jobs["plain"]
    process, notes = job.start(tmp_path / "out", "part@5", "wait", workers=3)
    assert wait_until((notes / "reached").exists, 30)
    pids = [int(path.name.split("-")[1]) for path in notes.glob("worker-*")]
    assert len(pids) == 3
    assert all(map(is_alive, pids))
    time.sleep(1.0)  # all that was handed out is done
    os.kill(process.pid, signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_alive, pids)), SECONDS_TO_END)
    job.end(process, notes)
