"""The report's section on what is needed to do its search again."""

from collections import Counter
from typing import Any

import pandas as pd

from saltray.config import counted
from saltray.records import environment
from saltray.records.settings import as_options
from saltray.reporting.findings import Findings
from saltray.reporting.page import Page


def add(page: Page, found: Findings) -> None:
    """Add the command, the machines, the sessions and the versions."""
    page.section("Environment", "What is needed to do this search again: the command, and what it ran on.")
    options = as_options(found.settings, found.folder / "space.py")
    page.command(environment.without_secrets(f"python -m saltray.tune {options}"))
    known = (t.user_attrs["hardware"] for t in found.trials if "hardware" in t.user_attrs)
    machines = Counter(map(_machine, known))
    facts = {
        "tiles": f"{found.tiles}, the first digits of the SHA-256 of their labels and split",
        "search space": f"{found.settings.space}, kept as space.py in the run's folder",
        "trained on": ", ".join(f"{name} (trials: {n})" for name, n in machines.items()) or "not known",
    }
    page.facts(facts)
    if not found.sessions:
        return
    shown = ("command", "commit", "machine", "python")
    rows = [
        {"started (UTC)": s["started"][:16].replace("T", " ")}
        | {name: environment.without_secrets(str(s.get(name) or "–")) for name in shown}
        for s in found.sessions
    ]
    page.table(pd.DataFrame(rows), "The sessions of this search, and saltray's commit (dirty: with changes).")
    versions: dict[str, dict[str, None]] = {}  # a dict keeps the order of the sessions
    for session in found.sessions:
        for name, version in session.get("versions", {}).items():
            versions.setdefault(name, {})[version] = None
    page.facts({name: " → ".join(known) for name, known in versions.items()})


def _machine(hardware: dict[str, Any]) -> str:
    """Name the hardware that a trial had: `AMD EPYC, 1 CPU`."""
    gpus = hardware["gpus"]
    share = counted(gpus, "GPU") if gpus else counted(hardware["cpus"], "CPU")
    return f"{hardware['device']}, {share}"
