"""The report's figures, from its numbers."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Summary = dict[str, Any]

COLORS = ("#0b5fa5", "#c8553d")
"""First and second endpoint; told apart in grey and with every common colour blindness, by lightness too."""
MARKERS = ("o", "s")
GREY = "#555555"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "maskpro",
    "figure.dpi": 150,
}


def draw(summary: Summary) -> dict[str, Figure]:
    """Figures by file name, to be drawn and saved under :data:`STYLE`; some need loads of a closed loop."""
    figures = {"latency": latency(summary), "ratios": ratios(summary)}
    if any(load["users"] for load in summary["loads"]):
        figures = {"throughput": throughput(summary), "knee": knee(summary), **figures}
    return figures


def _closed(summary: Summary) -> list[Summary]:
    return sorted((load for load in summary["loads"] if load["users"]), key=lambda load: load["users"])


def _sides(summary: Summary) -> list[tuple[str, str, str]]:
    return list(zip((summary["first"], summary["second"]), COLORS, MARKERS, strict=True))


def throughput(summary: Summary) -> Figure:
    """Tokens per second against users, with the range over rounds."""
    loads = _closed(summary)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    users = [load["users"] for load in loads]
    for name, color, marker in _sides(summary):
        sides = [load["endpoints"][name] for load in loads]
        middle = [side["tokens_per_second"] for side in sides]
        spread = [
            [value - min(side["tokens_per_second_by_round"]) for value, side in zip(middle, sides, strict=True)],
            [max(side["tokens_per_second_by_round"]) - value for value, side in zip(middle, sides, strict=True)],
        ]
        axes.errorbar(users, middle, yerr=spread, color=color, marker=marker, label=name, capsize=3, linewidth=2)
    for load in loads:
        if ratio := load["ratios"].get("tokens per second"):
            top = max(max(side["tokens_per_second_by_round"]) for side in load["endpoints"].values())
            axes.annotate(
                f"{ratio['ratio']:.2f}x", (load["users"], top), xytext=(0, 7), textcoords="offset points",
                ha="center", color=COLORS[0], fontweight="bold",
            )  # fmt: skip
    _users_axis(axes, users)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.set_ylabel("output tokens per second")
    axes.set_title(f"Throughput, {loads[0]['workload']} workload")
    axes.legend(loc="upper left")
    return figure


def latency(summary: Summary) -> Figure:
    """Time to first token and inter-token latency: p50, p90 and p99 at every load."""
    loads = summary["loads"]
    figure = Figure(figsize=(2.6 + 1.6 * len(loads), 4.2), layout="constrained")
    for axes, (key, title) in zip(
        figure.subplots(1, 2), (("ttft", "Time to first token"), ("itl", "Inter-token latency")), strict=True
    ):
        for offset, (name, color, _) in zip((-0.14, 0.14), _sides(summary), strict=True):
            for position, load in enumerate(loads):
                values = [load["endpoints"][name][key][p] * 1000 for p in ("p50", "p90", "p99")]
                x = position + offset
                axes.plot([x, x], [values[0], values[2]], color=color, linewidth=2, alpha=0.45)
                for value, marker, size in zip(values, ("o", "_", "^"), (7, 12, 6), strict=True):
                    axes.plot(x, value, marker, color=color, markersize=size, markeredgewidth=2 if marker == "_" else 1)
        axes.set_xticks(range(len(loads)), [f"{load['label']}\n{load['workload']}" for load in loads])
        axes.set_xlim(-0.5, len(loads) - 0.5)
        axes.grid(axis="x", visible=False)
        axes.set_yscale("log")
        _plain(axes.yaxis)
        axes.set_ylabel("ms")
        axes.set_title(title)
    handles = [axes.plot([], [], color=color, linewidth=3, label=name)[0] for name, color, _ in _sides(summary)]
    handles += [
        axes.plot([], [], marker, color=GREY, label=label)[0]
        for marker, label in (("o", "p50"), ("_", "p90"), ("^", "p99"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def knee(summary: Summary) -> Figure:
    """Latency against throughput as users are added: where the line turns up, more users only wait longer."""
    loads = _closed(summary)
    figure = Figure(figsize=(8.6, 4), layout="constrained")
    for axes, (key, title) in zip(
        figure.subplots(1, 2), (("itl", "Inter-token latency, p50"), ("e2e", "End to end, p50")), strict=True
    ):
        unit = 1000 if key == "itl" else 1
        for name, color, marker in _sides(summary):
            x = [load["endpoints"][name]["tokens_per_second"] for load in loads]
            y = [load["endpoints"][name][key]["p50"] * unit for load in loads]
            axes.plot(x, y, color=color, marker=marker, linewidth=2, label=name)
            for load, place in zip(loads, zip(x, y, strict=True), strict=True):
                axes.annotate(str(load["users"]), place, xytext=(6, -11), textcoords="offset points", color=color)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.margins(0.12)
        axes.set_xlabel("output tokens per second (points: users)")
        axes.set_ylabel("ms" if key == "itl" else "s")
        axes.set_title(title)
        axes.legend(loc="best")
    return figure


def ratios(summary: Summary) -> Figure:
    """How many times as good the first endpoint is, with 95% intervals."""
    loads = summary["loads"]
    names = list(dict.fromkeys(name for load in loads for name in load["ratios"]))
    figure = Figure(figsize=(7.4, 1.2 + 0.2 * len(names) * (len(loads) + 1)), layout="constrained")
    axes = figure.add_subplot()
    position, ticks = 0.0, []
    for name in names:
        start = position
        for load in loads:
            if (each := load["ratios"].get(name)) is None:
                continue
            good = each["low"] > 1
            color = COLORS[0] if good else COLORS[1] if each["high"] < 1 else GREY
            axes.plot([each["low"], each["high"]], [position, position], color=color, linewidth=2)
            axes.plot(each["ratio"], position, "o", color=color, markersize=6)
            axes.annotate(
                f"{load['label']}  {each['ratio']:.2f} [{each['low']:.2f}, {each['high']:.2f}]", (1.02, position),
                xycoords=("axes fraction", "data"), va="center", fontsize=8, color=color,
            )  # fmt: skip
            position -= 1
        ticks.append((start + position + 1) / 2)
        position -= 1
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(ticks, names)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"times as good as {summary['second']} (more throughput, less latency); 95% intervals")
    axes.set_title(f"{summary['first']} against {summary['second']}")
    return figure


def _users_axis(axes: Axes, users: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(users, [str(count) for count in users])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set_xlabel("concurrent users")


def _plain(axis: Any) -> None:
    """A log scale with labels of plain numbers, close enough for a narrow range."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
