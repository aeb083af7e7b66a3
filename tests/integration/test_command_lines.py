"""The programs as a user runs them: each a process with a Ray of its own."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from saltray.records.study import Counts, count, epochs_of, load_study, score
from saltray.search import gpus
from tests.integration.programs import PATIENCE, ROOT, Program, check_submission, search_arguments, trials_of

pytestmark = pytest.mark.timeout(900)


def test_search_predict_score_extend(start: type[Program], files: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = start(*search_arguments(files, run, "--trials", "2", "--epochs", "1")).finish()
    assert "24 training" in told
    assert "2 complete" in told
    assert "INFO" not in told and len(told.splitlines()) < 40
    check_submission(run, files)
    settings = json.loads((run / "run.json").read_text())
    assert settings["settings"]["trials"] == 2
    assert settings["sessions"][0]["versions"]["ray"]
    threshold = json.loads((run / "best" / "metrics.json").read_text())["threshold"]

    # The bundle alone, anywhere, gives the same submission, and the score can be told.
    bundle, alone = Path(shutil.copytree(run / "best", tmp_path / "bundle")), tmp_path / "alone.csv"
    assert (bundle / "model.onnx").is_file()
    assert f"at probability {threshold:.2f}" in (bundle / "README.md").read_text()
    predicting = start("saltray.predict", bundle, "--data", files / "data", "--out", alone, "--no-gpus")

    # A folder that holds a run is not touched.
    before = (run / "study.db").read_bytes()
    refused = start(*search_arguments(files, run, "--trials", "2")).finish(1)
    assert f"--resume {run}" in refused
    assert (run / "study.db").read_bytes() == before
    assert "keeps its own" in start("saltray.tune", "--resume", run, "--epochs", "9").finish(1)

    predicting.finish()
    assert alone.read_bytes() == (run / "submission.csv").read_bytes()
    assert 0 <= float(start("saltray.score", alone, files / "truth.csv").finish()) <= 1
    again = start("saltray.predict", run, "--data", files / "data", "--out", alone).finish(1)
    assert again.startswith("error:") and "already there" in again

    # Resuming extends it, here with the ensemble of the best trials; from then on this is what predicts.
    start("saltray.tune", "--resume", run, "--trials", "3", "--ensemble", "2").finish()
    study = load_study(run)
    assert count(study) == Counts(3, 0, 0, 0)
    assert len(json.loads((run / "run.json").read_text())["sessions"]) == 2
    check_submission(run, files)
    assert json.loads((run / "ensemble" / "metrics.json").read_text())["folds"] is None
    assert "validation tiles" in (run / "ensemble" / "README.md").read_text()
    joined = tmp_path / "joined.csv"
    predicting = start("saltray.predict", run, "--data", files / "data", "--out", joined)

    # Trials without their study are not begun anew.
    (run / "study.db").unlink()
    left = sorted(run.rglob("*"))
    assert "no study.db in it" in start("saltray.tune", "--resume", run).finish(1)
    assert sorted(run.rglob("*")) == left
    predicting.finish()
    assert joined.read_bytes() == (run / "submission.csv").read_bytes()


def test_killed_in_the_middle_resume_finishes_without_repeating(
    start: type[Program], files: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    program = start(*search_arguments(files, run, "--trials", "6", "--epochs", "4"))
    # First when it has told what it is to do, and nothing of it is there yet.
    program.wait_until(lambda: (run / "run.json").exists())
    program.end()
    for made in run.glob("study.db*"):
        made.unlink()
    for left in ("trials", "logs"):
        shutil.rmtree(run / left, ignore_errors=True)
    program = start("saltray.tune", "--resume", run)

    def in_the_middle() -> bool:
        trials = trials_of(run)
        under_way = [t for t in trials if t.intermediate_values and not t.state.is_finished()]
        return bool(under_way) and any(t.state.is_finished() for t in trials)

    program.wait_until(in_the_middle)
    program.end()
    ended = {t.number: t.datetime_complete for t in load_study(run).trials if t.state.is_finished()}
    assert 0 < len(ended) < 6
    # The run was moved, and so were its tiles; others are refused.
    run = run.rename(tmp_path / "moved")
    tiles = shutil.copytree(files / "data", tmp_path / "tiles")
    other = Path(shutil.copytree(tiles, tmp_path / "other"))
    *kept, last = (other / "train.csv").read_text().splitlines()
    (other / "train.csv").write_text("\n".join(kept) + "\n")
    for kind in ("images", "masks"):
        (other / "train" / kind / f"{last.partition(',')[0]}.png").unlink()
    refused = start("saltray.tune", "--resume", run, "--data", other).finish(1)
    assert "not the labelled tiles" in refused and "Traceback" not in refused
    start("saltray.tune", "--resume", run, "--data", tiles).finish()
    assert json.loads((run / "run.json").read_text())["settings"]["data"] == str(tiles)
    trials = load_study(run).trials
    # From their last epochs, of which the one under way is done again.
    assert all(len(epochs_of(t)) <= len(t.intermediate_values) + 1 for t in trials)
    assert count(load_study(run)).ended == 6 == len(trials)
    assert all(trials[number].datetime_complete == moment for number, moment in ended.items())
    assert all(
        sorted(t.intermediate_values) == list(range(1, len(t.intermediate_values) + 1)) for t in trials
    )
    check_submission(run, files)


def test_ctrl_c_once_still_writes_what_was_found(start: type[Program], files: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = start(*search_arguments(files, run, "--trials", "50", "--epochs", "40"))
    program.wait_until(lambda: any("checkpoint" in t.user_attrs for t in trials_of(run)))
    program.process.send_signal(signal.SIGINT)
    told = program.finish()
    assert f"--resume {run}" in told
    assert count(load_study(run)).waiting > 0
    check_submission(run, files)


def test_score_against_speed_gives_a_front(start: type[Program], files: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = search_arguments(files, run, "--objective", "map+speed", "--scheduler", "none")
    told = start(*arguments, "--trials", "1", "--epochs", "1").finish()
    assert "Pareto front" in told and "tiles/s" in told
    check_submission(run, files)
    told = start("saltray.tune", "--resume", run, "--trials", "2").finish()
    assert "Pareto front" in told
    study = load_study(run)
    assert count(study) == Counts(2, 0, 0, 0)
    assert all(t.values[0] == score(t) and t.values[1] > 0 for t in study.trials)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "absent"], "no such folder"),
        (["--trials", "0"], "--trials 0: Input should be greater"),
        (["--space", "absent.py"], "no such file"),
        (["--time-budget", "soon"], "not a duration"),
        (["--gpus-per-trial", "512"], "a worker trains on one GPU"),
        (["--address", "127.0.0.1:1"], "no Ray cluster there"),
        (["--resume", "absent"], "not the folder of a run"),
        (["--pseudo-labels"], "--pseudo-labels needs --folds"),
        (["--folds", "1"], "--folds 1: Input should be greater"),
        (["--gpu-hours", "1"], "--gpu-hours"),
        (["--gpus-per-trial", "auto", "--workers-per-trial", "2"], "--gpus-per-trial auto"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(
    start: type[Program], files: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    given = search_arguments(files, tmp_path / "run") if "--resume" not in arguments else ["saltray.tune"]
    told = start(*given, *arguments).finish(1)
    assert told.splitlines()[-1].startswith("error:") and words in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists() and not (ROOT / "absent").exists()


def test_bad_tiles_stop_the_search_before_it_starts_or_are_skipped(
    start: type[Program], files: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", files / "data", data], check=True)
    broken = ["train000003", "train000007", "test000030"]
    for name in broken:
        (data / name[: len(name) - 6] / "images" / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    arguments: list[str | Path] = [
        "saltray.tune",
        "--data",
        data,
        "--space",
        files / "space.py",
        "--out",
        tmp_path / "run",
    ]
    told = start(*arguments).finish(1)
    assert all(name in told for name in broken) and "--skip-bad" in told
    assert not (tmp_path / "run").exists()
    told = start(*arguments, "--skip-bad", "--trials", "1", "--epochs", "1").finish()
    assert "3 bad tiles left out" in told
    rows = pd.read_csv(tmp_path / "run" / "submission.csv", keep_default_na=False).set_index("id")
    assert rows.loc["test000030", "rle_mask"] == ""

    # So does `predict`; with a threshold that every pixel passes, each tile but the bad one is all salt.
    out = tmp_path / "out.csv"
    predict: list[str | Path] = ["saltray.predict", tmp_path / "run", "--data", data, "--out", out]
    told = start(*predict).finish(1)
    assert "test000030" in told and "--skip-bad" in told and not out.exists()
    told = start(*predict, "--skip-bad", "--threshold", "0.000001").finish()
    assert "1 bad tile got empty masks, such as test000030" in told
    codes = pd.read_csv(out, keep_default_na=False).set_index("id")["rle_mask"]
    assert codes.pop("test000030") == ""
    assert set(codes) == {"1 10201"}


def test_joins_a_running_cluster_and_shares_its_gpu(
    start: type[Program], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe, socket.socket() as another:
        ports = []
        for each in (probe, another):
            each.bind(("", 0))
            ports.append(each.getsockname()[1])
    port, clients = ports
    ray = Path(sys.executable).with_name("ray")
    options = (
        # Ray believes in a GPU that is not there.
        f"--head --block --num-cpus=3 --num-gpus=1 --port={port} --ray-client-server-port={clients} "
        "--include-dashboard=false --dashboard-port=0"
    )
    head = subprocess.Popen(
        [ray, "start", *options.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_port(port)
        arguments = search_arguments(files, tmp_path / "run", "--trials", "3", "--epochs", "1")
        arguments += ["--address", f"127.0.0.1:{port}", "--gpus-per-trial", "0.25"]
        if not torch.cuda.is_available():
            told = start(*arguments).finish(1)
            assert (
                "1 GPU by Ray's count, and none that can be used. PyTorch" in told.replace("\n", " ")
                and not (tmp_path / "run").exists()
            )
        monkeypatch.setenv(gpus.SIMULATED, "1")
        told = start(*arguments).finish()
        assert "3 side by side" in told.replace("\n", "") and "0.25 GPUs" in told
        assert "--gpus-per-trial 0.25" in told
        check_submission(tmp_path / "run", files)
    finally:
        head.terminate()  # Ray's own processes end with it
        head.wait(60)


def wait_for_port(port: int) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError("the cluster does not start")


def test_help_answers_without_loading_ray() -> None:
    code = (
        "import sys; import saltray.tune; sys.exit(any(m in sys.modules for m in ('ray', 'torch', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
