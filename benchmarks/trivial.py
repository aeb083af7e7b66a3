"""Trials that train nothing, for what measures the search itself."""

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from ray import tune


class Resources(NamedTuple):
    """Stands for `saltray.training.trial.WorkerResources` without torch: many actors must fit in memory."""

    gpus: float = 0.0
    workers: int = 1
    cpus: float = 1.0

    def training(self) -> dict[str, float]:
        """Return what a trial asks of Ray."""
        return {"CPU": 0.9, "GPU": self.gpus} if self.gpus else {"CPU": 0.9}


def run_trial(spec: dict[str, Any], *, epoch_seconds: float = 0.0, **_: Any) -> None:
    """Report every epoch, after a sleep, with a checkpoint of one small file; the dropout is its score."""
    epochs, score = spec["config"]["epochs"], spec["config"]["model"]["dropout"]
    for epoch in range(1, epochs + 1):
        time.sleep(epoch_seconds)
        metrics = {"map": score, "best_map": score, "loss": 1.0, "learning_rate": 1e-3}
        # Different in each epoch, as real ones are: the study's rows are no shorter.
        speed = {"seconds": 1.0 + epoch / 1e3, "tiles_per_second": 1.0, "validation_tiles_per_second": 1.0}
        more = {"epoch": epoch, "parameters": 1, "device": "none", "workers": 1, "finished": epoch == epochs}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "metrics.json").write_text("{}")
            tune.report(metrics | speed | more, checkpoint=tune.Checkpoint.from_directory(folder))
