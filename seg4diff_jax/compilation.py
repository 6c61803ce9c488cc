"""Compiled programs: kept between runs, and the time that making them takes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def keep_compiled_programs() -> None:
    """Keep them in the user's cache, so that the next process need not compile them again.

    A place that JAX has been told (JAX_COMPILATION_CACHE_DIR, `jax_compilation_cache_dir`) is left alone, and nothing
    is kept when it has been told to keep none: JAX_ENABLE_COMPILATION_CACHE=false in the environment, or
    `jax.config.update("jax_enable_compilation_cache", False)`.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "seg4diff-jax" / "compiled"))
    compilation_cache.reset_cache()  # if anything has been compiled, JAX would stay with having no place


class CompilationClock:
    """Counts, as a context, the seconds in which JAX traced, compiled or fetched compiled programs.

    JAX tells how long each piece took when it ends. Pieces lie one inside the other, so their union is what counts.
    """

    def __init__(self):
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> CompilationClock:
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))

    @property
    def seconds(self) -> float:
        total, end = 0.0, 0.0
        for start, stop in sorted(self._spans):
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return total
