"""`python -m benchmarks.ablation --data DIR`: what each technique is worth on one base.

Every technique is switched on (or off) alone, but for a few combinations, on the same base configuration,
tiles, epochs and seeds; its gain is the mean over the seeds of the difference to the base's run of the same
seed. The last weights are judged, so that no tile that judges them chose them. Results go into one JSON file
after each run, and a table beside it; a run that the file already has is not repeated, so an ablation may be
stopped and gone on with at any time, or extended by more seeds and techniques. Runs of another size want
another file.

    python -m benchmarks.ablation --data DIR --epochs 60 --filters 16 --out gpu.json    # full size, for a GPU
    python -m benchmarks.ablation --data DIR --epochs 12 --filters 8 --tiles 1500 --out cpu.json    # hours
    python -m benchmarks.ablation --data DIR --epochs 8 --filters 8 --tiles 800 --base pretrained
    python -m benchmarks.ablation --data DIR --epochs 5 --filters 8 --tiles 800      # goes on with the record
"""

import json
import math
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import ray
import torch
import typer

from benchmarks import techniques
from saltray import connection
from saltray.cli import run_program
from saltray.config import TrialConfig, UserError
from saltray.contest import metrics
from saltray.data import dataset, splitting, stream
from saltray.data.augment import Batch
from saltray.network import cpu
from saltray.prediction import inference, postprocessing
from saltray.quiet import quiet
from saltray.records import environment
from saltray.search.plan import Plan, plan
from saltray.training import checkpoint, loop
from saltray.training.trial import DATA_SHARE, EVALUATION_BATCH, WorkerResources

Run = dict[str, Any]


def measure(
    config: TrialConfig, tiles: ray.data.Dataset, validation: ray.data.Dataset, resources: WorkerResources
) -> Run:
    """Train one configuration on tiles to its end, and judge its last weights; runs as one Ray task."""
    started = time.perf_counter()
    cpu.use(resources.cpus)
    device = "cuda" if resources.gpus > 0 and torch.cuda.is_available() else "cpu"
    history, last = [], dict[str, Any]()
    judged: Run = {}
    # Between its epochs, enough to see it learn: a plateau of the rate and the curve ask for no more.
    few = validation.limit(EVALUATION_BATCH).materialize()

    def training_batches(epoch: int) -> loop.Batches:
        return stream.epoch_stream(
            tiles,
            config.augment,
            seed=config.seed,
            epoch=epoch,
            batch_size=config.batch_size,
            cpus_per_task=resources.cpus * DATA_SHARE,
            device=device,
        )

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        assert folder is not None
        history.append(metrics["map"])
        last.update(metrics)
        if metrics["finished"]:
            judged.update(cross_chosen(folder, validation, device))

    loop.fit(
        config,
        training_batches,
        lambda: stream.plain_stream(few, batch_size=EVALUATION_BATCH, device=device),
        report,
        steps=math.ceil(tiles.count() / config.batch_size),
        device=torch.device(device),
    )
    facts = {name: last[name] for name in ("loss", "parameters", "tiles_per_second")}
    return facts | judged | {"history": history, "seconds": time.perf_counter() - started}


def cross_chosen(folder: Path, tiles: ray.data.Dataset, device: str) -> Run:
    """Score the postprocessing on tiles that did not choose it: each half by the other half's choice.

    Of a training that keeps snapshots, the mean of these is judged.

    Returns:
        `plain`, the mAP at probability 0.5; `threshold`, with the threshold alone chosen; `mirrored`, also
        with the mean of both views; `chosen`, with the least area too, and mirrored only where it helped.
    """
    snapshots, config = checkpoint.load_snapshots(folder), checkpoint.load_config(folder).to_dict()
    models = [inference.Model(config, weights, 1 / len(snapshots)) for weights in snapshots]
    models = models or inference.load_models(folder)
    calibrator = inference.Calibrator(models, torch.get_num_threads(), gpu=device == "cuda")
    batches = tiles.iter_batches(batch_size=EVALUATION_BATCH)
    parts = [calibrator(cast(Batch, batch)) for batch in batches]
    counts = [np.concatenate([p[name] for p in parts]) for name in ("intersection", "union", "truth")]
    middle = postprocessing.PROBABILITIES.index(0.5)
    scores: Run = {"plain": float(metrics.precision(counts[0][:, 0, middle], counts[1][:, 0, middle]).mean())}
    half = np.arange(len(counts[2])) % 2
    found: dict[str, list[float]] = {"threshold": [], "mirrored": [], "chosen": []}
    for choosing in (0, 1):
        here, there = ([c[half == h] for c in counts] for h in (choosing, 1 - choosing))
        for name, view in (("threshold", 0), ("mirrored", 1)):
            best = int(metrics.precision(here[0][:, view], here[1][:, view]).mean(axis=0).argmax())
            found[name] += metrics.precision(there[0][:, view, best], there[1][:, view, best]).tolist()
        chosen, _ = postprocessing.choose(*here)
        found["chosen"] += metrics.precision(*postprocessing.apply(chosen, *there)).tolist()
    return scores | {name: statistics.fmean(values) for name, values in found.items()}


def summarise(runs: dict[str, Run]) -> list[Run]:
    """Return a row a technique: mean and spread over its seeds, its gain over the base; the best first."""
    by_name: dict[str, dict[str, Run]] = {}
    for key, result in runs.items():
        name, seed = key.rsplit("/", 1)
        by_name.setdefault(name, {})[seed] = result
    base = by_name.get(techniques.BASE_NAME, {})
    rows = []
    for name, seeds in by_name.items():
        scores = [r["chosen"] for r in seeds.values()]
        gains = [r["chosen"] - base[seed]["chosen"] for seed, r in seeds.items() if seed in base]
        rows.append(
            {
                "technique": name,
                "seeds": len(scores),
                "map": statistics.fmean(scores),
                "spread": statistics.stdev(scores) if len(scores) > 1 else math.nan,
                "gain": statistics.fmean(gains) if gains else math.nan,
                "gain_error": statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.nan,
                "plain": statistics.fmean(r["plain"] for r in seeds.values()),
                "minutes": statistics.fmean(r["seconds"] for r in seeds.values()) / 60,
            }
        )
    return sorted(rows, key=lambda row: math.inf if math.isnan(row["gain"]) else -row["gain"])


def table(content: dict[str, Any]) -> str:
    """Return the ablation as Markdown."""
    settings, environment = content["settings"], content["environment"]
    base = techniques.BASES[settings["base"]]
    lines = [
        "# Ablation",
        "",
        f"Base: {base.title}, {settings['filters']} filters (`benchmarks/techniques.py`), "
        f"{settings['epochs']} epochs, {settings['training_tiles']} training and "
        f"{settings['validation_tiles']} validation tiles. {environment['machine']}, {settings['device']}, "
        f"torch {environment['versions'].get('torch')}; begun {environment['started']}.",
        "",
        "mAP: with threshold, mirrored views and least area, each half of the validation tiles by the other "
        "half's choice, mean and standard deviation over the seeds. Gain: mean of its differences to the "
        "base's run of the same seed, ± its standard error. At 0.5: at probability 0.5, nothing chosen, "
        "which in short runs says more of a few wrong pixels in empty tiles than of the network. "
        f"Judged are the {settings.get('weights', 'best')} weights.",
        "",
        "| technique | seeds | mAP | spread | gain | at 0.5 | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summarise(content["runs"]):
        lines.append(
            f"| {row['technique']} | {row['seeds']} | {row['map']:.4f} | {row['spread']:.4f} | "
            f"{row['gain']:+.4f} ± {row['gain_error']:.4f} | {row['plain']:.4f} | {row['minutes']:.1f} |"
        )
    lines += ["", "What is done after training, on all these runs (mAP, one after the other):", ""]
    names = {"plain": "at 0.5", "threshold": "threshold chosen", "mirrored": "with the mirrored view"}
    names |= {"chosen": "with the least area"}
    means = {words: statistics.fmean(r[n] for r in content["runs"].values()) for n, words in names.items()}
    lines.append(", ".join(f"{words} {mean:.4f}" for words, mean in means.items()) + ".")
    return "\n".join(lines) + "\n"


def main(
    data: Annotated[str, typer.Option(help="The contest's folder, a path or URI.")],
    base: Annotated[str, typer.Option(help="What to change: scratch or pretrained.")] = "scratch",
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON to write or go on with; its table lies beside it. "
            "Default: benchmarks/results/ablation_BASE.json."
        ),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Just these techniques, and the base.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each technique.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Of each run.")] = 30,
    filters: Annotated[int, typer.Option(min=1, help="Of the base's first level.")] = 16,
    tiles: Annotated[int | None, typer.Option(help="Tiles to train on. Default: all of the split.")] = None,
    cpus: Annotated[float | None, typer.Option(help="CPUs of each run.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of each run, such as 0.25.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster to join.")] = None,
) -> None:
    """Measure what each technique is worth."""
    chosen = techniques.select(base, only)
    out = out or Path(f"benchmarks/results/ablation_{base}.json")
    rows = dataset.read_train(dataset.open_folder(data))
    # The tiles, and their split, are the same for every seed: a seed is another start and another order.
    fold = splitting.stratified_folds(rows.rows["coverage"], splitting.FOLDS, seed=0)
    order = np.random.default_rng(0).permutation(np.flatnonzero(fold != 0))
    if tiles is not None and not 32 <= tiles <= len(order):
        raise UserError(f"--tiles {tiles}: between 32 and {len(order)}")
    trains = np.isin(np.arange(len(fold)), order[:tiles])
    with quiet(None):
        connection.connect(address)
    try:
        with quiet(None):
            decoded = [dataset.decode(rows.where(part))[0] for part in (trains, fold == 0)]
        placed = plan(connection.nodes(), trials=len(chosen) * seeds, cpus=cpus, gpus=gpus)
        settings = {
            "base": base,
            "values": techniques.BASES[base].values,
            "epochs": epochs,
            "filters": filters,
            "training_tiles": decoded[0].count(),
            "validation_tiles": decoded[1].count(),
            "weights": "last",
            "tiles": dataset.fingerprint(rows, fold),
            "device": "GPU" if placed.resources.gpus else "CPU",
        }
        content = open_results(out, settings)
        # Seed after seed, so that an ablation that is cut off has all techniques equally often.
        wanted = [(name, seed) for seed in range(seeds) for name in chosen]
        waiting = [w for w in wanted if f"{w[0]}/{w[1]}" not in content["runs"]]
        typer.echo(f"{len(wanted)} runs, {len(waiting)} to do, {placed.concurrency} side by side")
        run_all(waiting, content, decoded, placed, out)
    finally:
        connection.disconnect()
    typer.echo(table(content))


def open_results(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results so far.

    Raises:
        UserError: the file holds other things, or runs of another size that would not compare.
    """
    if not out.exists():
        return {"settings": settings, "environment": environment.describe(), "runs": {}}
    try:
        content: dict[str, Any] = json.loads(out.read_text())
        known = content["settings"]
        content["runs"], content["environment"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: holds no ablation: {error!r}; name another --out") from None
    if known != settings:
        raise UserError(f"{out}: holds runs under {known}, not {settings}; name another --out")
    return content


def run_all(
    waiting: list[tuple[str, int]],
    content: dict[str, Any],
    tiles: list[ray.data.Dataset],
    placed: Plan,
    out: Path,
) -> None:
    """Run what is left, as many at once as fit; write the results after each."""
    asked = placed.resources.training()
    task: Any = ray.remote(num_cpus=asked["CPU"], num_gpus=asked.get("GPU", 0), max_retries=1)(measure)
    settings, queue, running = content["settings"], list(waiting), dict[Any, tuple[str, int]]()
    while queue or running:
        while queue and len(running) < placed.concurrency:
            name, seed = queue.pop(0)
            config = techniques.configure(
                settings["base"], name, settings["filters"], settings["epochs"], seed
            )
            running[task.remote(config, *tiles, placed.resources)] = (name, seed)
        (done,), _ = ray.wait(list(running), num_returns=1)
        name, seed = running.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            typer.echo(f"{name}, seed {seed}: failed: {error.cause!r}", err=True)
            continue
        content["runs"][f"{name}/{seed}"] = result | {"commit": environment.describe()["commit"]}
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(out)
        out.with_suffix(".md").write_text(table(content))
        typer.echo(f"{name}, seed {seed}: {result['chosen']:.4f} in {result['seconds']:.0f} s")


if __name__ == "__main__":
    run_program(main)
