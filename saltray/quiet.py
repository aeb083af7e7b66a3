"""Keeps what libraries say away from the terminal."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet(log: Path | None) -> Iterator[None]:
    """Send what Ray, Optuna and Python's warnings say to a file (or nowhere), instead of the terminal."""
    if log is not None:
        log.parent.mkdir(exist_ok=True)  # of a run behind a URI, a folder that was empty is not there
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((log or Path(os.devnull)).open("a", buffering=1))
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        for name in ("saltray", "ray", "ray.data", "ray.tune", "ray.train", "optuna"):
            logger = logging.getLogger(name)
            before = logger.handlers
            # Ray Data's own file handler stays; what prints goes.
            logger.handlers = [h for h in before if not isinstance(h, logging.StreamHandler)] + [handler]
            stack.callback(setattr, logger, "handlers", before)
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        # Ray's C++ core writes to the descriptor itself.
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        stack.callback(os.close, stderr)
        stack.callback(os.dup2, stderr, 2)
        yield
