"""Keeps compiled programs between runs, and measures the time of compilation."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache, so that the next process does not compile them again.

    A cache directory that is already configured (JAX_COMPILATION_CACHE_DIR, `jax_compilation_cache_dir`) is kept.
    Nothing is cached if the cache is turned off: by JAX_ENABLE_COMPILATION_CACHE=false in the environment, or by
    `jax.config.update("jax_enable_compilation_cache", False)`.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # the user has no home directory, as in some containers
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "seg4diff-jax" / "compiled"))
    compilation_cache.reset_cache()  # without it, JAX ignores the directory once it has compiled anything


class CompilationClock:
    """A context that counts the seconds in which JAX traces, compiles, or fetches compiled programs.

    JAX reports the duration of each such event when the event ends. Events are nested, so `seconds` is the length of
    their union.
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
        """Seconds counted so far."""
        total, end = 0.0, 0.0
        for start, stop in sorted(self._spans):
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return total
