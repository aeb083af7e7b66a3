"""`python -m benchmarks`: how fast saltray is, against what a user would otherwise write, in the same run.

Each group of rows runs in a process of its own with a time limit, so that one that fails or hangs is shown
as failed and the others go on. The table goes to the terminal and to `benchmarks/SPEED.md`, every single
figure to `benchmarks/results/speed.json`; both compare with the last committed run.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks import table
from saltray.cli import run_program
from saltray.config import UserError

HERE = Path(__file__).parent
RESULTS, MARKDOWN = HERE / "results" / "speed.json", HERE / "SPEED.md"


class Group(NamedTuple):
    """Rows that are measured together: a module of this package with a function `measure`."""

    module: str
    limit: float
    """Seconds after which it has failed; several times what it takes on two calm cores."""


GROUPS = {
    "metric": Group("scoring", 60),
    "start": Group("starting", 360),
    "trial": Group("trials", 180),
    "training": Group("training", 720),
    "gpu": Group("gpu", 600),
    "search": Group("searching", 600),
    "thousand": Group("thousand", 600),
    "predict": Group("predicting", 480),
    "memory": Group("memory", 300),
    "bigger": Group("bigger", 480),
    "workers": Group("workers", 480),
}


def run_group(name: str) -> table.Rows:
    """Measure a group in a process of its own; a failure is a row that says why."""
    from saltray.local_ray import SETTINGS

    with tempfile.TemporaryDirectory(prefix="speed-", ignore_cleanup_errors=True) as scratch:
        out, log = Path(scratch) / "rows.json", Path(scratch) / "log"
        command = [sys.executable, "-m", "benchmarks", "--only", name, "--child", str(out)]
        # The settings of the cluster files, for the groups that simulate a cluster.
        environment = os.environ | {"TMPDIR": scratch} | SETTINGS
        environment.pop("RAY_ADDRESS", None)  # always a Ray of its own
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=HERE.parent, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            try:
                code = process.wait(GROUPS[name].limit)
                reason = f"failed with exit status {code}"
            except subprocess.TimeoutExpired:
                reason = f"failed: not done after {GROUPS[name].limit:g} s"
            finally:
                # All that it started; what is in sessions of its own, Ray, ends with its driver.
                _kill_session(process)
        if out.exists():
            return [{**row, "group": name} for row in json.loads(out.read_text())]
        last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
        print(log.read_text()[-4000:], file=sys.stderr)
    return [_failed(name, f"{reason}: {last[:200]}")]


def _failed(group: str, note: str) -> dict[str, Any]:
    from benchmarks.rows import Row

    return Row(group, None, note=note).to_dict() | {"group": group}


def _kill_session(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _child(name: str, out: Path) -> None:
    """Measure a group here."""
    rows = importlib.import_module(f"benchmarks.{GROUPS[name].module}").measure()
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps([row.to_dict() for row in rows]))
    temporary.replace(out)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Run just these groups.")] = None,
    child: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, print a table, and write it with every figure; groups that are left out keep theirs."""
    unknown = set(only or ()) - GROUPS.keys()
    if unknown:
        raise UserError(f"--only {min(unknown)}: there are {', '.join(GROUPS)}")
    if child is not None:
        for name in only or ():
            _child(name, child)
        return
    import torch

    from saltray.network import cpu
    from saltray.records import environment

    # Ended like an interrupted one: the group under way ends too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    before, rows = table.committed(RESULTS), []
    for name in only or GROUPS:
        started = time.monotonic()
        new = run_group(name)
        table.judge(new, before)
        rows += new
        for row in new:
            value = table.figure(row["value"], row["unit"])
            typer.echo(f"{row['what']:<62} {value:>14}  {table.goal(row):<28} {row['note']}")
        typer.echo(f"  {name}: {time.monotonic() - started:.0f} s")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    here = environment.describe() | {"cpu": cpu.name(), "gpu": gpu}
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    # Of groups measured at another time the file keeps the environment as well.
    rows = [{**row, "environment": here} for row in rows]
    merged = table.merge(known, rows, GROUPS)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": merged}, indent=1) + "\n")
    MARKDOWN.write_text(table.markdown(merged, before, here))


if __name__ == "__main__":
    run_program(main)
