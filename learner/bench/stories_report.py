"""The table and the figure of stories.py, from its rows."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

from maskpro_kernels.files import write_atomically
from maskpro_learner.learning_log import moving_average

Row = dict[str, Any]

HEADER = """\
# stories15M

Token perplexity on the second half of the stories, which no mask has seen; what `learner/bench/stories.py` printed.
Estimators start from the {start} mask of the same pattern and have the same number of forward passes (a backward pass
counts as two). *Against the initial mask* is the change of the loss in nats per token; ± is its standard error over
the test stories, which are the same for every mask, and it is the mean where there are several seeds. *Spread* is the
lowest and the highest perplexity among the seeds. *Changed* is the share of the kept weights that learning exchanged.

| pattern | mask | calibration | perplexity | spread | against the initial mask | changed | CPU s |
|---|---|---|---|---|---|---|---|
"""


def write_table(rows: list[Row], path: Path, start: str) -> None:
    """Rows that differ in their seed only become one line."""
    lines = []
    initial = {row["run"]["pattern"]: row for row in rows if row["run"]["method"] == start}
    for group in _by_seed(rows):
        run = group[0]["run"]
        perplexities = [row["perplexity"] for row in group]
        spread = f"{min(perplexities):.3f} to {max(perplexities):.3f}" if len(group) > 1 else ""
        against = changed = ""
        if run["start"]:
            mean, error = difference(group, initial[run["pattern"]])
            against = f"{mean:+.4f} ± {error:.4f}"
            changed = f"{statistics.mean(row['changed'] for row in group):.2%}"
        seconds = statistics.mean(row["cpu_seconds"] for row in group)
        lines.append(
            f"| {run['pattern']} | {label(run, start)} | {run['samples']} x {run['length']} | "
            f"{statistics.mean(perplexities):.3f} | {spread} | {against} | {changed} | {seconds:.0f} |"
        )
    write_atomically(path, (HEADER.format(start=start) + "\n".join(lines) + "\n").encode())


def label(run: Row, start: str) -> str:
    """What a line is about."""
    if not run["start"]:
        where = " (where learning starts)" if run["method"] == start else ""
        return f"{run['method']}{where}"
    settings = f"eta {run['learning_rate']:g}, pi_0 {run['initial_logit']:g}"
    passes = f"{run['passes']} passes of {run['minibatch']} x {run['length']}"
    kind = "the paper's start, " if run["start"] == "constant" else ""
    return f"{run['method']} ({kind}{settings}, {passes})"


def difference(group: list[Row], initial: Row) -> tuple[float, float]:
    """Mean change of the loss per token from the initial mask, and its standard error over stories."""
    tokens = initial["tokens"]
    changes = [statistics.mean(row["losses"][i] for row in group) - initial["losses"][i] for i in range(len(tokens))]
    mean = sum(changes) / sum(tokens)
    # of a ratio of sums: story i adds what it changes beyond its share of tokens
    rest = [change - mean * count for change, count in zip(changes, tokens, strict=True)]
    return mean, sum(x * x for x in rest) ** 0.5 / sum(tokens)


def _by_seed(rows: list[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str({key: value for key, value in row["run"].items() if key != "seed"}), []).append(row)
    return list(groups.values())


def write_figure(rows: list[Row], path: Path, length: int) -> None:
    """The residual over the passes for few and many samples, one panel for each estimator (MaskPro, Figure 5)."""
    from matplotlib.figure import Figure  # without pyplot there is no display to ask for

    few = [row for row in rows if row["run"]["length"] == length and row["curve"]]
    methods = list(dict.fromkeys(row["run"]["method"] for row in few))
    figure = Figure(figsize=(5.2 * len(methods), 3.8), layout="constrained")
    for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        for row, colour in zip(
            (row for row in few if row["run"]["method"] == method), ("tab:red", "tab:orange", "tab:blue"), strict=False
        ):
            run, curve = row["run"], row["curve"]
            passes = [run["passes"] * (i + 1) / len(curve) for i in range(len(curve))]
            axes.plot(passes, curve, ".", markersize=2, alpha=0.25, color=colour)
            plural = "sample" if run["samples"] == 1 else "samples"
            axes.plot(
                passes, moving_average(curve, 0.9), color=colour,
                label=f"{run['samples']} {plural}, test perplexity {row['perplexity']:.2f}",
            )  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"{method}, {few[0]['run']['pattern']}, stories15M")
        axes.set_xlabel("forward passes")
        axes.set_ylabel("training loss minus the initial mask's, nats")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())
