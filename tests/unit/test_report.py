"""The report of synthetic runs: one well-formed file without outside references, holding the data's points."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_conan.evaluation.report import read_metrics, write_report
from megatron_conan.evaluation.svg import HEIGHT, MAX_POINTS, WIDTH, make_ticks, smooth

SVG = "{http://www.w3.org/2000/svg}"
STAGES = [
    {"stage": "weak", "loss": 1.5, "ndcg": 0.40, "ndcg_low": 0.35, "ndcg_high": 0.45, "bm25": 0.5, "seconds": 65},
    {"stage": "finetune", "loss": 1.0, "ndcg": 0.55, "ndcg_low": 0.50, "ndcg_high": 0.60, "bm25": 0.5, "seconds": 20},
]
QUESTIONS = [
    {"question": "which <one> & why?", "hit": True, "hits": [{"title": "os.path <join>", "score": 0.75}]},
    {"question": "no answer?", "hit": False, "hits": []},
]


def write_run(folder: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def make_page(tmp_path: Path, runs: dict[str, Path], summary: dict[str, Any]) -> tuple[str, ElementTree.Element]:
    write_report(runs, summary, tmp_path / "out" / "report.html", title="A <run>")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    return text, ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def charts(page: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {svg.attrib["aria-label"]: svg for svg in page.iter(f"{SVG}svg")}


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]  # type: ignore[misc]


def test_full_report(tmp_path: Path) -> None:
    weak = [
        {"step": n, "stage": "weak", "loss": 3 - n / 50, "alpha": n / 100, "tokens_per_second": 1000.0 + n}
        for n in range(1, 101)
    ]
    finetune = [
        {
            "step": n,
            "stage": "finetune",
            "loss": 2.0,
            "positive_similarity": 0.5 + n / 200,
            "negative_similarity": 0.5 - n / 200,
            "negatives_age": (n - 1) % 10,
        }
        for n in range(1, 41)
    ]
    runs = {"weak": write_run(tmp_path / "weak", weak), "finetune": write_run(tmp_path / "finetune", finetune)}
    text, page = make_page(
        tmp_path, runs, {"stages": STAGES, "bm25": {"plain": 0.3, "stemmed": 0.5}, "questions": QUESTIONS}
    )
    drawn = charts(page)
    assert list(drawn) == [
        "nDCG@10 after each stage",
        "weak: loss",
        "finetune: loss",
        "weak: alpha",
        "finetune: similarity",
    ]

    raw, mean = [points(line) for line in drawn["weak: loss"].iter(f"{SVG}polyline")]
    assert len(raw) == len(mean) == 100
    assert [x for x, _ in raw] == sorted(x for x, _ in raw)
    falling = [y for _, y in raw]  # the loss falls linearly, so pixels rise in equal steps
    assert falling == sorted(falling)
    assert falling[-1] - falling[0] == pytest.approx(99 * (falling[50] - falling[40]) / 10, abs=1)
    alpha = points(next(drawn["weak: alpha"].iter(f"{SVG}polyline")))
    assert alpha[-1][1] < alpha[0][1]

    similarity = drawn["finetune: similarity"]
    assert [line.find(f"{SVG}title").text for line in similarity.iter(f"{SVG}polyline")] == ["positives", "negatives"]  # type: ignore
    events = [line for line in similarity.iter(f"{SVG}line") if line.attrib["class"] == "event"]
    assert [event.find(f"{SVG}title").text for event in events] == [f"re-mined, step {n}" for n in (11, 21, 31)]  # type: ignore

    quality = drawn["nDCG@10 after each stage"]
    assert [dot.find(f"{SVG}title").text for dot in quality.iter(f"{SVG}circle")] == [  # type: ignore[union-attr]
        "weak: 0.400 (95% interval 0.350 to 0.450)",
        "finetune: 0.550 (95% interval 0.500 to 0.600)",
    ]
    levels = [line for line in quality.iter(f"{SVG}line") if line.attrib["class"] == "level"]
    dots = list(quality.iter(f"{SVG}circle"))
    heights = [
        float(height)
        for height in (dots[1].attrib["cy"], levels[1].attrib["y1"], dots[0].attrib["cy"], levels[0].attrib["y1"])
    ]
    assert heights == sorted(heights)

    labels = {node.text for svg in drawn.values() for node in svg.iter(f"{SVG}text")}
    assert {
        "step",
        "loss (nats per query)",
        "alpha (0 to 1)",
        "cosine similarity (-1 to 1)",
        "nDCG@10 (0 to 1)",
    } <= labels
    table = ["".join(cell.itertext()) for cell in page.iter("td")]
    assert table[:8] == ["weak", "100", "1.500", "0.400", "0.350 – 0.450", "0.500", "1,051", "1 min 5 s"]
    words = " ".join(page.itertext())
    assert "which <one> & why?" in words
    assert "os.path <join>  0.750" in words
    assert "✓ expected answer found" in words
    assert "✗ expected answer missing" in words
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {
            "stages": [{"stage": "pretrain", "loss": None, "ndcg": float("nan")}],
            "bm25": {"plain": None},
            "questions": [{"question": "?"}],
        },
    ],
)
def test_report_without_most_of_its_data(tmp_path: Path, summary: dict[str, Any]) -> None:
    runs = {
        "pretrain": write_run(tmp_path / "one", [{"step": 1, "loss": 2.5}]),
        "sft": tmp_path / "absent",
        "weak": write_run(tmp_path / "nothing", [{"step": 1, "loss": float("nan"), "alpha": 1.0}]),
    }
    _, page = make_page(tmp_path, runs, summary)
    drawn = charts(page)
    assert list(drawn) == ["pretrain: loss"]
    assert len(list(drawn["pretrain: loss"].iter(f"{SVG}circle"))) == 2
    _, page = make_page(tmp_path, {}, {})
    assert not charts(page)


def test_gaps_and_long_series(tmp_path: Path) -> None:
    """A loss that is not finite leaves a gap; thousands of steps are thinned and stay inside the frame."""
    rows = [{"step": n, "loss": math.nan if n == 50 else math.sin(n)} for n in range(1, 101)]
    long_rows = [{"step": n, "loss": math.exp(-n / 900)} for n in range(1, 4001)]
    runs = {"sft": write_run(tmp_path / "gap", rows), "weak": write_run(tmp_path / "long", long_rows)}
    _, page = make_page(tmp_path, runs, {})
    drawn = charts(page)
    lines = [points(line) for line in drawn["sft: loss"].iter(f"{SVG}polyline")]
    assert [len(line) for line in lines] == [49, 50, 49, 50]
    for line in drawn["weak: loss"].iter(f"{SVG}polyline"):
        assert MAX_POINTS / 2 < len(points(line)) <= MAX_POINTS
        assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in points(line))


def test_metrics_file_of_a_killed_run(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9}]
    assert read_metrics(write_run(tmp_path / "killed", rows, tail='{"step": 3, "lo') / "metrics.jsonl") == rows
    damaged = write_run(tmp_path / "damaged", rows[:1], tail='{"step": \n{"step": 3, "loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a metrics line"):
        read_metrics(damaged / "metrics.jsonl")


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.307, 0.536), (-3.2, 11.0), (5.0, 5.0), (0.0, 0.0), (1e-6, 3e-6), (1, 250000)]
)
def test_ticks_are_round_and_span_the_range(low: float, high: float) -> None:
    ticks = make_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low <= high <= ticks[-1]
    steps = {round(b - a, 9 if high > 1e-3 else 12) for a, b in pairwise(ticks)}
    assert len(steps) == 1
    assert f"{steps.pop():e}"[0] in "125"


def test_smoothing_keeps_constants_and_gaps() -> None:
    assert smooth([2.0] * 100) == [2.0] * 100
    smoothed = smooth([1.0, 2.0, math.nan, 4.0] * 25, fraction=0.1)
    assert [math.isnan(value) for value in smoothed] == [False, False, True, False] * 25
    assert all(1.5 < value < 3.2 for value in smoothed[10:-10] if not math.isnan(value))
    assert smooth([3.0]) == [3.0]
