"""What Grafana would show wrong without a word: panels one upon another, numbers red by its own default threshold."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

MONITORING = Path(__file__).parents[2] / "docs/monitoring"
PANELS: list[dict[str, Any]] = json.loads((MONITORING / "dashboard.json").read_text())["panels"]


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    columns = range(place["x"], place["x"] + place["w"])
    return set(itertools.product(columns, range(place["y"], place["y"] + place["h"])))


def test_panels_fill_the_grid_and_do_not_overlap():
    taken = [cell for panel in PANELS for cell in cells(panel)]
    height = 1 + max(y for _, y in taken)
    assert sorted(taken) == list(itertools.product(range(24), range(height)))
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_a_number_has_a_color_of_ours():
    """Where a panel says nothing, Grafana draws all above 80 in red."""
    for panel in PANELS:
        if panel["type"] == "stat":
            defaults = panel["fieldConfig"]["defaults"]
            fixed = defaults.get("color", {}).get("mode") == "fixed"
            assert fixed or defaults.get("thresholds", {}).get("steps"), panel["title"]


def test_a_table_shows_no_columns_that_say_nothing():
    for panel in PANELS:
        if panel["type"] == "table":
            (organize,) = panel["transformations"]
            hidden = organize["options"]["excludeByName"]
            assert all(hidden[column] for column in ("Time", "Value", "__name__", "job")), panel["title"]
