"""Commands draw small: how large a screen wants its pictures is no statement of these tests."""

from __future__ import annotations

import pytest

from seg4diff_jax.reporting import overlays


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlays, "SHORTEST_LONG_SIDE", 320)
        yield
