"""Shapes in signatures are checked at each call, wherever the module lies."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from seg4diff_jax.convert.verify.comparison import decided_labels
from seg4diff_jax.models.kernels import log_normalizer
from seg4diff_jax.reporting.overlays import shares


@pytest.mark.parametrize(
    "call",
    [
        lambda: log_normalizer(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3, 4))),
        lambda: shares(np.zeros(4, np.int32), 2),
        lambda: decided_labels(np.zeros(4, np.float32), np.zeros(4, np.float32)),
    ],
    ids=["models", "reporting", "convert, which is linked"],
)
def test_an_array_with_too_few_axes_is_refused(call: Callable):
    with pytest.raises(TypeCheckError):
        call()
