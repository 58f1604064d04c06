"""Runs of the data tools that are killed and go on, and what must come of them (killed_tool.py has the points)."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tool_inputs import outputs, write_bytes, write_rows

from megatron_conan.data.tokenizer import Tokenizer

DRIVER = Path(__file__).with_name("killed_tool.py")
SECONDS = 120.0
"""What a run may take."""
SECONDS_TO_END = 8.0
"""What workers may take to notice that they are alone."""
WORDS = [f"word{i}" for i in range(300)]
BAD = [b'{"text": "half', b"\xff\xfe", b'{"text": 3}', b"[]"]


def documents(folder: Path, count: int, seed: int) -> list[Path]:
    """Files of all forms with `count` documents, of which many come twice, and bad lines between them."""
    rng = random.Random(seed)
    pool = [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(count // 2)]
    folder.mkdir()
    paths = []
    for number, form in enumerate((".jsonl", ".jsonl.gz", ".parquet", ".txt.zst", ".jsonl")):
        texts = rng.choices(pool, k=count // 5)
        path = folder / f"{number}{form}"
        if "txt" in form:
            lines = [text.encode() for text in texts]
            lines[len(lines) // 3] = b"not \xff UTF-8"
            write_bytes(path, b"\n".join(lines))
        else:
            write_rows(path, [{"text": text, "number": i} for i, text in enumerate(texts)], group=60)
        if form == ".jsonl":
            lines = path.read_bytes().splitlines()
            for i, line in enumerate(BAD * (1 + count // 1000)):
                lines.insert(rng.randrange(len(lines)), line + b" " * i)
            path.write_bytes(b"\n".join(lines))
        paths.append(path)
    return paths


def pairs(folder: Path, count: int, seed: int, kind: str) -> list[Path]:
    """Files of all forms with `count` retrieval or classification rows, and bad lines between them."""
    rng = random.Random(seed)
    pool = [" ".join(rng.choices(WORDS, k=rng.randint(1, 25))) for _ in range(count)]
    folder.mkdir()
    paths = []
    for number, form in enumerate((".jsonl.gz", ".parquet", ".jsonl")):
        rows: list[dict[str, Any]]
        if kind == "classification":
            rows = [{"text": text, "label": f"c{rng.randrange(30)}"} for text in rng.choices(pool, k=count // 3)]
        else:
            rows = [
                {
                    "query": f"{query}?",
                    "positive": rng.choices(pool, k=2),
                    "negative": rng.choices(pool, k=rng.randint(1, 4)),
                }
                for query in rng.choices(pool, k=count // 3)
            ]
        paths.append(write_rows(folder / f"{number}{form}", rows, group=30))
    with paths[-1].open("ab") as file:
        file.write(b'{"query": "no positive"}\n')
    return paths


@dataclass
class Run:
    """How a run of the tool ended."""

    code: int
    stdout: str
    stderr: str
    notes: Path

    @property
    def reached(self) -> bool:
        """Whether it came to its point."""
        return (self.notes / "reached").exists()

    @property
    def went_on(self) -> bool:
        """Whether it began with the work of another one."""
        return "going on with the unfinished" in self.stderr

    @property
    def tokens(self) -> int:
        """Tokens that this run made itself."""
        return sum(int(found.replace(",", "")) for found in re.findall(r"tokenising: ([\d,]+) tokens in", self.stderr))

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        return [int(path.name.split("-")[1]) for path in self.notes.glob("worker-*")]


def is_alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(is_there: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes in so many seconds."""
    deadline = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@dataclass
class Job:
    """A tool with its input; makes runs of it."""

    tool: str
    options: list[str]
    tokenizer: Tokenizer
    folder: Path
    """For notes and outputs."""
    chunk_bytes: int
    expected: dict[str, bytes] = field(default_factory=dict)
    """The outputs of a run that nothing happens to."""
    num_tokens: int = 0
    """That such a run makes."""
    num_runs: int = 0

    def command(
        self, prefix: Path, *, point: str, how: str, workers: int, commit: float, more: Sequence[str]
    ) -> list[str]:
        """The command line of the next run."""
        self.num_runs += 1
        notes = self.folder / f"notes{self.num_runs}"
        notes.mkdir()
        call = [self.tool, *self.options, "--tokenizer-model", str(self.tokenizer.path), "--output-prefix", str(prefix)]
        driver = [sys.executable, "-P", str(DRIVER), str(notes), point, how, str(commit), str(self.chunk_bytes)]
        return [*driver, *call, "--workers", str(workers), *more]

    def start(
        self,
        prefix: Path,
        point: str = "never",
        how: str = "self",
        *,
        workers: int = 2,
        commit: float = 0.0,
        more: Sequence[str] = (),
        before: Callable[[], None] | None = None,
    ) -> tuple[subprocess.Popen[str], Path]:
        """Start a run in a process group of its own: (process, folder of its notes)."""
        command = self.command(prefix, point=point, how=how, workers=workers, commit=commit, more=more)
        notes = Path(command[3])
        with (notes / "stdout").open("w") as stdout, (notes / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, text=True, start_new_session=True, preexec_fn=before
            )
        return process, notes

    def run(self, prefix: Path, point: str = "never", how: str = "self", **options: Any) -> Run:
        """Run to its end."""
        process, notes = self.start(prefix, point, how, **options)
        return self.end(process, notes)

    def end(self, process: subprocess.Popen[str], notes: Path) -> Run:
        """How a run ends. Its workers must be gone soon after it."""
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        run = Run(code, (notes / "stdout").read_text(), (notes / "stderr").read_text(), notes)
        assert wait_until(lambda: not any(map(is_alive, run.workers())), SECONDS_TO_END), "workers run on alone"
        return run

    def make_expected(self) -> None:
        """Run without anything happening."""
        prefix = self.folder / "expected" / "out"
        run = self.run(prefix, workers=1, commit=1e9)
        assert run.code == 0, run.stderr
        self.expected, self.num_tokens = outputs(prefix), run.tokens

    def check_finished(self, run: Run, prefix: Path) -> None:
        """All outputs are those of a run that nothing happened to, and nothing else is there."""
        assert run.code == 0, run.stderr
        assert outputs(prefix) == self.expected
        names = sorted(path.name for path in prefix.parent.iterdir())
        assert names == sorted(f"{prefix.name}{suffix}" for suffix in self.expected)

    def check_killed(self, run: Run, prefix: Path, older: dict[str, bytes]) -> None:
        """It died at its point; the older outputs stand there as they were, or what stands there is not taken for whole."""
        assert run.reached, run.stderr
        assert run.code == -signal.SIGKILL, run.stderr
        there = outputs(prefix)
        assert there in (older, self.expected) or ".json" not in there

    def check_kill_and_go_on(
        self, prefix: Path, points: Sequence[tuple[str, str]], *, workers: Sequence[int] = (2, 1, 3)
    ) -> list[Run]:
        """Kill a run at the first point, the next at the second, ..; then one goes on to the end. Returns all."""
        prefix.parent.mkdir(exist_ok=True)
        runs = []
        for number, (point, how) in enumerate(points):
            older = outputs(prefix)
            runs.append(self.run(prefix, point, how, workers=workers[number % len(workers)]))
            self.check_killed(runs[-1], prefix, older)
        runs.append(self.run(prefix, workers=workers[len(points) % len(workers)]))
        self.check_finished(runs[-1], prefix)
        return runs
