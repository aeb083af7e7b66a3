"""The results of `python -m benchmarks` as tables: for the terminal, and in Markdown with the run before."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.rows import Goal

Rows = list[dict[str, Any]]
"""Rows of one file, as `rows.Row.to_dict` makes them, each with its `group` and whether its goal is `met`."""


def figure(value: float | None, unit: str) -> str:
    """Write a value in three digits, or more where it is large: `1.27 x`, `18,000 tiles`."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def goal(row: dict[str, Any]) -> str:
    """Write a row's goal, and whether it is met."""
    if row["goal"] is None:
        return ""
    text = f"{row['goal']['sense']} {figure(row['goal']['bound'], row['unit'])}"
    return text if row["met"] is None else f"{text}: {'met' if row['met'] else 'missed'}"


def judge(rows: Rows, before: Rows) -> None:
    """Set whether each row's goal is `met`; None where there is no goal, or nothing was measured."""
    for row in rows:
        old = find(before, row)
        row["met"] = None
        if row["goal"] is not None and row["value"] is not None:
            row["met"] = Goal(**row["goal"]).met(row["value"], old["value"] if old else None)


def find(rows: Rows, row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of the same name among others."""
    same = (r for r in rows if (r["group"], r["what"]) == (row["group"], row["what"]))
    return next(same, None)


def merge(before: Rows, now: Rows, groups: Iterable[str]) -> Rows:
    """Return a file's new rows: those of the groups that were measured now, the others as they were.

    Args:
        before: rows of the last run.
        now: rows of this run.
        groups: every group there is, in the table's order.
    """
    measured = {row["group"] for row in now}
    both = now + [row for row in before if row["group"] not in measured]
    return [row for name in groups for row in both if row["group"] == name]


def committed(file: Path) -> Rows:
    """Return the rows of a file's last committed version; none where there is no such version."""
    git = ["git", "-C", str(file.parent), "show", f"HEAD:./{file.name}"]
    try:
        text = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout
        return list(json.loads(text)["rows"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return []


def markdown(rows: Rows, before: Rows, environment: dict[str, Any]) -> str:
    """Write the table, with each row's figure in the last committed run.

    Args:
        rows: of this run.
        before: of the last committed run.
        environment: `environment.describe()` of this run, with `cpu` and `gpu`.
    """
    lines = [
        "| what | measured | least to most | before | goal | how | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        run = row.get("environment", environment)
        # A row that was not measured now is its own "before".
        old = find(before, row) if run["started"] == environment["started"] else None
        several = row["spread"] and row["spread"][0] != row["spread"][1]
        spread = " to ".join(figure(v, "") for v in row["spread"]) if several else ""
        cells = [
            row["what"],
            f"**{figure(row['value'], row['unit'])}**" if row["value"] is not None else "",
            spread,
            figure(old["value"], old["unit"]) if old else "",
            goal(row),
            row["note"],
            run["commit"] or "",
        ]
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    head = (
        "# Speed\n\n"
        f"`{environment['command']}`, {environment['started'][:10]}: {environment['machine']} "
        f"({environment['cpu']}; {environment['gpu'] or 'no GPU'}), Python {environment['python']}, "
        f"{versions}. Written by that command, with `results/speed.json`, which has every run; rows of "
        "another commit were measured before. A ratio (x) is against the peer in the same run, above 1 where "
        "saltray is faster if nothing else is said; figures are medians of runs in turn, where there are "
        'several. "before" is the last committed run.\n\n'
    )
    return head + "\n".join(lines) + "\n"
