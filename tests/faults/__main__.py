"""Faults, injected for real into searches on three namespace hosts: `python -m tests.faults [NAME ...]`.

Each fault meets the same search: the same seed, tiles and space. What came of it goes to
benchmarks/results/faults.json and the table of benchmarks/FAULTS.md; the other faults' figures stay.
"""

import fcntl
import json
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from saltray.records import environment
from tests.cluster.hosts import hosts, missing
from tests.faults.bench import Bench
from tests.faults.injected import FAULTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
TABLE = ROOT / "benchmarks" / "FAULTS.md"
COLUMNS = {
    "completed": "trials completed",
    "failed": "trials failed",
    "lost": "trials lost",
    "run again": "finished trials run again",
    "epochs redone": "epochs redone",
    "recovery, s": "recovery seconds",
    "leaked groups": "leaked placement groups",
    "best mAP": "best mAP",
}


def write_table(kept: dict[str, Any]) -> None:
    """Put the figures into the table of FAULTS.md, which stands between two marks."""
    lines = [f"| fault | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in FAULTS:
        figures = kept["faults"].get(name, {})
        cells = [str(figures.get(key, "" if figures else "not measured yet")) for key in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    before, start, rest = TABLE.read_text().partition("<!-- table -->\n")
    TABLE.write_text(before + start + "\n".join(lines) + "\n" + rest[rest.index("<!-- end -->") :])


def keep(name: str, figures: dict[str, Any], environment: dict[str, Any]) -> None:
    """Put a fault's figures beside those of the others, which another process may be adding to."""
    with (Path(tempfile.gettempdir()) / "saltray-faults.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"faults": {}}
        kept["environment"] = environment
        kept["faults"][name] = figures | {"commit": environment["commit"], "started": environment["started"]}
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
        write_table(kept)


def main(names: list[str]) -> None:
    """Inject the named faults, or all; print and keep the figures."""
    unknown = set(names) - FAULTS.keys()
    if unknown:
        sys.exit(f"{min(unknown)}: there are {', '.join(FAULTS)}")
    if reason := missing():
        sys.exit(reason)
    here = environment.describe()
    failed: list[str] = []
    with hosts() as these:
        bench = Bench(these)
        these.ray_up()
        for name in names or FAULTS:
            started = time.monotonic()
            try:
                figures = FAULTS[name](bench)
            except Exception:  # the other faults' figures are wanted all the same
                traceback.print_exc()
                failed.append(name)
                bench.heal()
                continue
            figures["seconds in all"] = round(time.monotonic() - started, 1)
            print(name, json.dumps(figures, indent=2), flush=True)
            keep(name, figures, here)
            bench.heal()
    if failed:
        sys.exit(f"no figures of: {', '.join(failed)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the hosts are ended
    main(sys.argv[1:])
