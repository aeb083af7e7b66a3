from typing import Any


def result(epoch: int, value: float, **more: Any) -> dict[str, Any]:
    """A result as Ray Tune hands it to the search."""
    row: dict[str, Any] = {"epoch": epoch, "best_map": value, "map": value, "loss": 0.5}
    row |= {"learning_rate": 1e-3, "seconds": float(epoch), "tiles_per_second": 9.0}
    row |= {"validation_tiles_per_second": 30.0, "parameters": 100, "device": "a CPU", "workers": 1}
    return {**row, "node_ip": "10.0.0.1", "hostname": "h", "time_total_s": 1.0, **more}
