"""report.html of a run or demo folder: one file, no script, nothing loaded from elsewhere.

It parses as XML too. What a run does not have (no alpha, no questions) is left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_conan.evaluation.svg import (
    IntervalPoint,
    LineChart,
    Series,
    draw_intervals,
    draw_lines,
    smooth,
)
from megatron_conan.train.run_folder import write_atomically

LOSS_UNITS = {
    "pretrain": "nats per token",
    "sft": "nats per token",
    "weak": "nats per query",
    "finetune": "nats per query",
}
Metrics = dict[str, list[dict[str, Any]]]
"""Stage -> rows of its metrics.jsonl."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f5f2; --card: #fdfdfc; --ink: #1c1c1a; --soft: #5d5c57; --grid: #e4e3de;
  --axis: #a9a8a2; --s1: #2468b8; --s2: #c8590b; --good: #1d7a3f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1d; --ink: #efeeea; --soft: #aeada6;
  --grid: #343430; --axis: #6b6a64; --s1: #6aa6ee; --s2: #f09a4e; --good: #6cc58d; --bad: #f2877f; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; }
h1 { font-size: 25px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 34px 0 10px; }
p { margin: 4px 0 10px; color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: 12px 16px; }
.tile { min-width: 170px; } .tile b { display: block; font-size: 25px; line-height: 1.25; font-weight: 600; }
.tile span { color: var(--soft); font-size: 13px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); gap: 14px; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
svg .title { font-size: 14px; font-weight: 600; fill: var(--ink); }
svg .tick, svg .label { fill: var(--soft); }
svg .ink, svg .value { fill: var(--ink); } svg .value { font-weight: 600; stroke: var(--card);
  stroke-width: 4; paint-order: stroke; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--axis); }
svg .line, svg .bar { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .s1 { stroke: var(--s1); } svg .s2 { stroke: var(--s2); }
svg .dot { stroke: var(--card); stroke-width: 2; } svg .dot.s1 { fill: var(--s1); } svg .dot.s2 { fill: var(--s2); }
svg .faint { stroke-width: 1; opacity: .35; }
svg .level { stroke: var(--s2); stroke-width: 1.5; stroke-dasharray: 6 4; } svg .lead { stroke: var(--axis); fill: none; }
svg .event { stroke: var(--axis); stroke-width: 1.5; stroke-dasharray: 2 3; }
.scroll { overflow-x: auto; } .wide { min-width: 620px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
.question { margin: 0 0 12px; } .question h3 { font-size: 15px; margin: 0 0 6px; display: flex; gap: 12px;
  justify-content: space-between; } .yes { color: var(--good); } .no { color: var(--bad); }
.question span { white-space: nowrap; font-weight: 500; }
ol { margin: 0; padding-left: 24px; } li { overflow-wrap: anywhere; } li i { font-style: normal; color: var(--soft); }
"""


def write_report(
    run_dirs: Mapping[str, Path], summary: Mapping[str, Any], out: Path, *, title: str = "Training report"
) -> None:
    """Writes the page, under a temporary name first.

    Args:
        run_dirs: stage -> run folder, in the order of training; `metrics.jsonl` is read from each that has one.
        summary: all keys optional. `stages`: rows {stage, loss, ndcg, ndcg_low, ndcg_high, bm25, seconds}; `bm25`: name ->
            nDCG@10; `questions`: rows {question, hits: [{title, score}], hit}.
        out: file to write.

    Raises:
        ValueError: a line of a metrics.jsonl other than the last is malformed.
    """
    metrics = {stage: read_metrics(Path(folder) / "metrics.jsonl") for stage, folder in run_dirs.items()}
    stages = list(summary.get("stages") or [])
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(' → '.join(run_dirs) or 'no stages')}</p>",
        _tiles(stages, summary.get("bm25") or {}),
        _section(
            "Retrieval quality",
            "Mean nDCG@10 over the held-out queries after each stage; bars are 95% bootstrap "
            "intervals over queries, dashed lines are BM25 on the same queries.",
            _quality(stages, summary.get("bm25") or {}),
        ),
        _section("Loss", "Pale: every step. Strong: running mean. Scales differ between stages.", _losses(metrics)),
        _section("Soft mask", "Opening of the attention: 0 is causal, 1 is bidirectional.", _alphas(metrics)),
        _section(
            "Positives and hard negatives",
            "Mean cosine similarity of queries to their positives and to their hard negatives, in training batches.",
            _similarities(metrics),
        ),
        _section("Stages", "", _stage_table(stages, metrics)),
        _section(
            "Questions",
            "The best hits of the finished model for questions asked in plain words.",
            _questions(summary.get("questions") or []),
        ),
    ]
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"/><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main>{chr(10).join(filter(None, body))}</main></body></html>\n"
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl in order; none if the file is absent. A cut-off last line (a killed run) is dropped."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            float(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a metrics line ({error})") from error
        rows.append(row)
    return rows


def _section(heading: str, text: str, content: str) -> str:
    if not content:
        return ""
    return f"<section><h2>{escape(heading)}</h2>" + (f"<p>{escape(text)}</p>" if text else "") + content + "</section>"


def _card(content: str) -> str:
    return f'<div class="card">{content}</div>'


def _panels(charts: Sequence[str]) -> str:
    return f'<div class="panels">{"".join(map(_card, charts))}</div>' if charts else ""


def _number(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number of the row, or None."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _tiles(stages: Sequence[Mapping[str, Any]], bm25: Mapping[str, Any]) -> str:
    scored = [row for row in stages if _number(row, "ndcg") is not None]
    tiles = []
    if scored:
        last = scored[-1]
        tiles.append((f"{last['ndcg']:.3f}", f"nDCG@10 after {last.get('stage', 'the last stage')}"))
        if _number(last, "ndcg_low") is not None and _number(last, "ndcg_high") is not None:
            tiles.append((f"{last['ndcg_low']:.3f} – {last['ndcg_high']:.3f}", "95% interval over queries"))
    levels = {name: value for name in bm25 if (value := _number(bm25, name)) is not None}
    if levels:
        best = max(levels, key=levels.__getitem__)
        tiles.append((f"{levels[best]:.3f}", f"best BM25: {best}"))
    seconds = [value for row in stages if (value := _number(row, "seconds")) is not None]
    if seconds:
        tiles.append((_duration(sum(seconds)), "all stages together"))
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in tiles
    )
    return f'<div class="tiles">{inner}</div>' if tiles else ""


def _quality(stages: Sequence[Mapping[str, Any]], bm25: Mapping[str, Any]) -> str:
    points = [
        IntervalPoint(str(row.get("stage", "")), value, _number(row, "ndcg_low"), _number(row, "ndcg_high"))
        for row in stages
        if (value := _number(row, "ndcg")) is not None
    ]
    lines = {f"BM25 {name}": value for name in bm25 if (value := _number(bm25, name)) is not None}
    if not points:
        return ""
    chart = draw_intervals("nDCG@10 after each stage", "nDCG@10 (0 to 1)", points, lines)
    return _card(f'<div class="scroll"><div class="wide">{chart}</div></div>')


def _columns(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that hold `key`; a value that is no finite number becomes NaN."""
    held = [row for row in rows if key in row]
    values = [value if (value := _number(row, key)) is not None else math.nan for row in held]
    return [float(row["step"]) for row in held], values


def _has_values(values: Sequence[float]) -> bool:
    return any(map(math.isfinite, values))


def _losses(metrics: Metrics) -> str:
    charts = []
    for stage, rows in metrics.items():
        steps, values = _columns(rows, "loss")
        if _has_values(values):
            charts.append(
                draw_lines(
                    LineChart(
                        f"{stage}: loss",
                        "step",
                        f"loss ({LOSS_UNITS.get(stage, 'nats')})",
                        [
                            Series("every step", steps, values, faint=True),
                            Series("running mean", steps, smooth(values)),
                        ],
                    )
                )
            )
    return _panels(charts)


def _alphas(metrics: Metrics) -> str:
    charts = []
    for stage, rows in metrics.items():
        steps, values = _columns(rows, "alpha")
        if _has_values(values) and len(set(values)) > 1:
            charts.append(
                draw_lines(
                    LineChart(
                        f"{stage}: alpha",
                        "step",
                        "alpha (0 to 1)",
                        [Series("alpha", steps, values)],
                        y_range=(0.0, 1.0),
                    )
                )
            )
    return _panels(charts)


def _similarities(metrics: Metrics) -> str:
    charts = []
    for stage, rows in metrics.items():
        series = []
        for colour, (key, label) in enumerate(
            [("positive_similarity", "positives"), ("negative_similarity", "negatives")], 1
        ):
            steps, values = _columns(rows, key)
            if _has_values(values):
                series.append(Series(label, steps, smooth(values), colour))
        if series:
            mined = _mining_steps(rows)
            charts.append(
                draw_lines(
                    LineChart(
                        f"{stage}: similarity",
                        "step",
                        "cosine similarity (-1 to 1)",
                        series,
                        events={"re-mined": mined} if mined else {},
                    )
                )
            )
    return _panels(charts)


def _mining_steps(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Steps at which the age of the mined negatives fell: a new search came in."""
    steps, ages = _columns(rows, "negatives_age")
    return [step for step, before, now in zip(steps[1:], ages, ages[1:], strict=False) if now < before]


def _stage_table(stages: Sequence[Mapping[str, Any]], metrics: Metrics) -> str:
    summary = {str(row.get("stage")): row for row in stages}
    names = list(dict.fromkeys([*summary, *metrics]))
    header = [
        "stage",
        "steps",
        "last loss",
        "nDCG@10",
        "95% interval",
        "BM25, identifiers split",
        "tokens per second",
        "time",
    ]
    lines = []
    for name in names:
        row, rows = summary.get(name, {}), metrics.get(name, [])
        last = rows[-1] if rows else {}
        loss = _number(row, "loss") if _number(row, "loss") is not None else _number(last, "loss")
        low, high, seconds = _number(row, "ndcg_low"), _number(row, "ndcg_high"), _number(row, "seconds")
        speeds = sorted(value for entry in rows if (value := _number(entry, "tokens_per_second")) is not None)
        lines.append(
            [
                name,
                f"{last['step']:,}" if last else "",
                _decimals(loss),
                _decimals(_number(row, "ndcg")),
                f"{low:.3f} – {high:.3f}" if low is not None and high is not None else "",
                _decimals(_number(row, "bm25")),
                f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "",
                _duration(seconds) if seconds is not None else "",
            ]
        )
    if not lines:
        return ""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return _card(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def _questions(questions: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for row in questions:
        kind, verdict = ("yes", "✓ expected answer found") if row.get("hit") else ("no", "✗ expected answer missing")
        mark = "" if row.get("hit") is None else f'<span class="{kind}">{verdict}</span>'
        hits = "".join(
            f"<li>{escape(str(hit.get('title', '')))} <i>{_decimals(_number(hit, 'score'))}</i></li>"
            for hit in row.get("hits") or []
        )
        parts.append(
            f'<div class="card question"><h3>{escape(str(row.get("question", "")))}{mark}</h3>'
            + (f"<ol>{hits}</ol>" if hits else "<p>no hits</p>")
            + "</div>"
        )
    return "".join(parts)


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 5 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
