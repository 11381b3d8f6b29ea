"""Writes a comparison's report: JSON, CSV, markdown, figures, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import figures
import jinja2
import matplotlib
import tables
from latency import LATENCIES, PERCENTILES, summarize
from records import RunFile
from results import Results
from summary import summarize_comparison

CAPTIONS = {
    "throughput": "Output tokens per second by concurrent users; bars: lowest and highest round.",
    "latency": "Latency percentiles at every load, log scale.",
    "knee": "Latency against throughput as users are added: where a line turns up, more users only wait longer.",
    "ratios": "How many times as good, with 95% intervals; grey: the interval includes 1.",
}


def write_report(results: Results) -> int:
    """Writes ``report.json``, ``runs.csv``, ``report.md``, ``report.html`` and the figures as PNG.

    Returns:
        How many requests failed.

    Raises:
        ValueError: a run has not been measured yet, or has no answered request.
    """
    summary = summarize_comparison(results)
    folder = results.folder
    failed = sum(side["failed"] for load in summary["loads"] for side in load["endpoints"].values())
    failed += sum(each["failed"] for each in summary["calibration"])
    images = {}
    with matplotlib.rc_context(figures.STYLE):  # when saved, too: equal numbers are equal files
        for name, figure in figures.draw(summary).items():
            figure.savefig(folder / f"{name}.png", dpi=150)
            svg = io.StringIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            images[name] = base64.b64encode(svg.getvalue().encode()).decode()
    template = Path(__file__).with_name("report.html.j2").read_text()
    page = jinja2.Environment(autoescape=True).from_string(template)
    shown = tables.tables(summary)
    _write(folder / "report.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    _write(folder / "runs.csv", _csv(results))
    _write(folder / "report.md", _markdown(summary, shown, list(images)))
    _write(
        folder / "report.html",
        page.render(
            s=summary, headline=tables.headline(summary), failed=failed, images=images, captions=CAPTIONS,
            tables=shown, method=tables.method(summary),
        ),
    )  # fmt: skip
    return failed


def _markdown(summary: dict[str, Any], shown: list[tables.Table], images: list[str]) -> str:
    parts = [f"# {summary['first']} against {summary['second']}", tables.headline(summary)]
    parts += [f"![{CAPTIONS[name]}]({name}.png)" for name in CAPTIONS if name in images]
    parts += [table.markdown() for table in shown]
    parts += ["## How it was measured", tables.method(summary), f"Command: `{summary['command']}`"]
    return "\n\n".join(parts) + "\n"


def _csv(results: Results) -> str:
    """A line for each run; times in seconds."""
    names = [f"{latency}_{p}" for latency in LATENCIES for p in (*(f"p{p}" for p in PERCENTILES), "mean")]
    counts = ["requests", "ok", "failed", "timeouts", "aborted", "retries", "prompt_tokens", "completion_tokens"]
    rates = ["wall_seconds", "tokens_per_second", "requests_per_second", "generator_cpu_share"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["endpoint", "round", "workload", "users", "rate", "seed", *counts, *rates, *names])
    for cell in results.cells():
        run = RunFile.read(results.path(cell))
        side = summarize([run])
        values = [side[latency][p] for latency in LATENCIES for p in side[latency]]
        writer.writerow(
            [
                *(cell.endpoint, cell.round_number + 1, cell.load.workload, cell.load.users, cell.load.rate),
                run.settings["seed"],
                *(side[name] for name in counts),
                *(f"{value:.6g}" for value in [*(side[name] for name in rates), *values]),
            ]
        )
    return text.getvalue()


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    temporary.replace(path)
