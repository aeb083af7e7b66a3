"""Which configuration is tried next, where, and for how long: Optuna behind Ray Tune."""
