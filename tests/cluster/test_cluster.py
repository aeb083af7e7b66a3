"""`ray up` with cluster/on-prem.yaml, a search on three hosts, `ray down`: for real, on namespace hosts."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from saltray import demo
from saltray.config import UserError
from saltray.contest import rle
from saltray.data import dataset, png, splitting
from saltray.records import study
from saltray.training import checkpoint, loop
from tests.cluster.hosts import HEAD, PATIENCE, ROOT, SHARED, WORKERS, Hosts, hosts, missing, wait_for

why_not = missing()
pytestmark = [
    pytest.mark.skipif(why_not is not None, reason=f"no namespace hosts: {why_not}"),
    pytest.mark.timeout(900),
]

SPACE = """
def space(trial):
    return {
        "model": {"filters": trial.suggest_int("filters", 1, 3), "levels": 1, "dropout": 0.0},
        "optim": {"learning_rate": 1e-2},
        "batch_size": 8,
    }
"""
TILES = f"--data {SHARED}/demo/data --space {SHARED}/tiny.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    with hosts() as these:
        demo.write(these.shared / "demo", demo.files(train=60, test=12, seed=0))
        (these.shared / "tiny.py").write_text(SPACE)
        these.ray_up()
        yield these


def test_the_jobs_api_is_on_loopback_and_wants_the_token(cluster: Hosts) -> None:
    code = "curl -s -m 60 -o /dev/null -w '%{http_code}\\n'"
    url = "127.0.0.1:8265/api/jobs/"
    assert cluster.on("h0", f"{code} {url}").strip() == "401"
    assert cluster.on("h0", f"{code} -H 'Authorization: Bearer guess' {url}").strip() in ("401", "403")
    refused = 7  # as curl tells that nothing listens; of the head itself, which answers SSH
    assert cluster.on("h1", f"{code} {HEAD}:8265/api/jobs/ || echo $?").split() == ["000", str(refused)]
    assert cluster.on("h1", f"bash -c '</dev/tcp/{HEAD}/22' && echo yes").strip() == "yes"


def test_a_search_writes_its_submission_into_the_shared_folder_and_the_token_nowhere(cluster: Hosts) -> None:
    said = cluster.finish(cluster.submit(f"{TILES} --trials 4 --epochs 2 --out {SHARED}/run"))
    assert "4 complete" in said and "3 side by side" in said
    submission = pd.read_csv(cluster.shared / "run" / "submission.csv", keep_default_na=False)
    sample = pd.read_csv(cluster.shared / "demo" / "data" / "sample_submission.csv")
    assert submission["id"].tolist() == sample["id"].tolist()
    for code in submission["rle_mask"]:
        rle.decode(code)
    token = (cluster.folder / "lap" / "tmp" / "home" / ".ray" / "auth_token").read_text().strip()
    written = [f for f in (cluster.shared / "run").rglob("*") if f.is_file()]
    assert written and not [f for f in written if token.encode() in f.read_bytes()]


def test_a_folder_that_is_not_shared_is_refused_before_the_first_trial(cluster: Hosts) -> None:
    job = cluster.submit(f"{TILES} --trials 2 --epochs 1 --out /tmp/home/run")
    assert wait_for(lambda: cluster.status(job) in ("FAILED", "SUCCEEDED"), PATIENCE)
    said = " ".join(cluster.logs(job).split())
    assert re.search(r"error: /tmp/home/run: h[12] \(10\.77\.0\.1[12]\) does not share it", said), said
    assert "ls: cannot" in cluster.on("h0", "ls /tmp/home/run 2>&1 || true")  # and nothing was written


def test_two_hosts_train_one_trial_and_agree_with_one_process(cluster: Hosts) -> None:
    settings = "--trials 1 --epochs 2 --workers-per-trial 2"
    cluster.finish(cluster.submit(f"{TILES} {settings} --out {SHARED}/ddp"))
    best = cluster.shared / "ddp" / "best"
    images, masks = validation_tiles(cluster.shared / "demo" / "data", seed=0)
    alone, _ = loop.evaluate(
        checkpoint.load_model(best), [{"image": images, "mask": masks}], torch.device("cpu"), None
    )
    assert alone == pytest.approx(json.loads((best / "metrics.json").read_text())["best_map"], abs=1e-9)
    assert workers_hosts(cluster) >= 2


def test_a_search_runs_on_every_host_and_stopped_still_writes_its_model(cluster: Hosts) -> None:
    run = cluster.shared / "stopped"
    # So many epochs that no trial ends before the slowest host has its own.
    job = cluster.submit(f"{TILES} --trials 4 --epochs 5000 --scheduler none --out {SHARED}/stopped")
    assert wait_for(lambda: hosts_of_epochs(run) == {HEAD, *WORKERS}, PATIENCE), cluster.logs(job)
    cluster.on("lap", f"RAY_AUTH_MODE=token ray job stop --address http://127.0.0.1:8265 {job}")
    assert cluster.status(job) == "STOPPED"
    assert len(pd.read_csv(run / "submission.csv")) == 12 and (run / "report.html").is_file()
    checkpoint.load_model(run / "best")
    assert "cut off" in cluster.logs(job)


def hosts_of_epochs(run: Path) -> set[str]:
    """Return the addresses of the hosts whose epochs a run's study knows; the run may not be there yet."""
    try:
        trials = study.load_study(run).trials
    except UserError:
        return set()
    return {row["host"] for trial in trials for row in trial.user_attrs.get("epochs", [])}


def workers_hosts(cluster: Hosts) -> int:
    """Count the hosts on which a worker of several has run, by Ray's own logs there."""
    there = 0
    for host in ("h0", "h1", "h2"):
        logs = cluster.on(host, "grep -l RayTrainWorker -r /tmp/ray/session_latest/logs || true")
        there += bool(logs.strip())
    return there


def validation_tiles(data: Path, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the validation tiles without Ray: images and masks, uint8 (tiles, 101, 101)."""
    rows = dataset.read_train(dataset.open_folder(str(data))).rows
    rows = rows[splitting.stratified_folds(rows["coverage"], 5, seed) == 0]
    images = [torch.tensor(png.decode_image(Path(p).read_bytes())) for p in rows["image"]]
    masks = [torch.tensor(png.decode_mask(Path(p).read_bytes())) for p in rows["mask"]]
    return torch.stack(images), torch.stack(masks)


def test_ray_down_ends_it_and_nothing_is_left(cluster: Hosts) -> None:
    cluster.ray_down()
    # Ray's two agents of a worker follow a minute later; waiting for them would be most of this test.
    agents = "ray::(DashboardAgent|RuntimeEnvAgent)"
    ray = f"ps -e -o args | grep -E 'raylet|gcs_server|saltray[.]|ray::' | grep -vE 'grep|{agents}' || true"

    def left() -> list[str]:
        return [line for host in ("h0", "h1", "h2") for line in cluster.on(host, ray).splitlines()]

    assert wait_for(lambda: not left(), 180, every=2), left()


def test_the_hosts_leave_nothing_behind() -> None:
    with hosts() as these:
        folder, processes = these.folder, these.processes()
        assert len(processes) >= 5  # the network's first process and four SSH servers
        assert cut_off_and_back(these)
    assert not folder.exists()
    assert not [p for p in processes if Path(f"/proc/{p}").exists()]


def cut_off_and_back(these: Hosts) -> bool:
    """Cut a host's link, heal it, power the host off, boot it; tell whether it answers when it should."""
    ping = f"timeout 1 bash -c '</dev/tcp/{WORKERS[0]}/22' 2>/dev/null && echo yes || echo no"

    def answers() -> bool:
        return these.on("lap", ping).strip() == "yes"

    for act, expected in {"cut": False, "heal": True, "off": False, "boot": True}.items():
        these.script(act, "h1")
        if not (wait_for(answers, 60) if expected else not answers()):
            return False
    return ROOT.exists()
