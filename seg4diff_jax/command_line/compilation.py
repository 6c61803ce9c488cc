"""Compiled programs: kept between runs, and the time that making them takes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import jax


def keep_compiled_programs() -> None:
    """Keep them in the user's cache, unless JAX has been told a place (JAX_COMPILATION_CACHE_DIR) or to keep none."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "seg4diff-jax" / "compiled"))


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
