"""However a host program has set JAX up, noise, masks, figures and training are those of one that sets nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.evaluation.benchmarks import folder_benchmark
from seg4diff_jax.evaluation.measurement import Settings
from seg4diff_jax.evaluation.run import evaluate
from seg4diff_jax.flow import image_noise
from seg4diff_jax.numerics import FIXED, LEFT, settled
from seg4diff_jax.segmentation.unsupervised_scores import UnsupervisedProtocol
from seg4diff_jax.training.loop import train
from tests.reference.inputs import NAMES, SQUARE, an_image
from tests.reference.small_training import OPTIMIZER, Net, make_run, make_task

OTHERWISE: dict[str, tuple[Any, ...]] = {
    "jax_enable_x64": (True,),
    "jax_explicit_x64_dtypes": ("allow", "error"),
    "jax_default_matmul_precision": ("bfloat16", "BF16_BF16_F32"),
    "jax_default_prng_impl": ("rbg", "unsafe_rbg"),
    "jax_threefry_partitionable": (False,),
    "jax_random_seed_offset": (7,),
    "jax_high_dynamic_range_gumbel": (True,),
    "jax_accurate_erf_inv": (True,),
    "jax_disable_jit": (True,),
    "jax_softmax_custom_jvp": (True,),
    "jax_use_direct_linearize": (False,),
    "jax_scan3": (True,),
    "jax_remat3": (True,),
    "jax_remat_barrier_no_cotangents": (True,),
    "jax_custom_jvp3": (True,),
    "jax_custom_vjp3": (True,),
    "jax_use_hlo_logistic_lowering": (True,),
    "eager_constant_folding": (True,),
    "jax_use_simplified_jaxpr_constants": (True,),
    "jax_embedded_constants_max_bytes": (0,),
    "jax_numpy_dtype_promotion": ("strict",),
    "jax_numpy_rank_promotion": ("raise",),
    "jax_allow_f16_reductions": (False,),
    "jax_transfer_guard": ("disallow",),
    "jax_enable_custom_prng": (True,),
    "jax_legacy_prng_key": ("error",),
    "jax_debug_key_reuse": (True,),
    "jax_auto_pcast": (False,),
    "jax_error_checking_behavior_nan": ("raise",),
    "jax_error_checking_behavior_divide": ("raise",),
    "jax_error_checking_behavior_oob": ("raise",),
}
"""What a host program may have set instead."""
CHECKS: dict[str, tuple[Any, ...]] = {
    "jax_debug_nans": (True,),
    "jax_debug_infs": (True,),
    "jax_enable_checks": (True,),
}
"""Left to the user: they find nothing wrong with a sound call."""
CASES = [(option, value) for option, values in (OTHERWISE | CHECKS).items() for value in values]
KNOWN = ("0.10.", "0.12.")


@contextmanager
def set_to(option: str, value: Any) -> Iterator[None]:
    before = jax.config.values[option]
    jax.config.update(option, value)
    try:
        yield
    finally:
        jax.config.update(option, before)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory) -> Iterator[None]:
    """A training run compiles its step anew; here each finds the first one's, unless an option makes it another."""
    kept = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")), "jax_enable_compilation_cache": True}
    with ExitStack() as options:
        for option, value in (kept | {"jax_persistent_cache_min_compile_time_secs": 0}).items():
            options.enter_context(set_to(option, value))
        compilation_cache.reset_cache()
        yield
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def pipe(sd3_checkpoint) -> s4d.Pipeline:
    return s4d.load(sd3_checkpoint, blocks=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("set")
    for name in ("images", "labels"):
        (root / name).mkdir()
    (root / "classes.txt").write_text("cat\nsky\ntree")
    for number in range(2):
        labels = np.kron([[number, 1], [2, 255]], np.ones((32, 32))).astype(np.uint8)
        Image.fromarray(an_image(64, 64, number)).save(root / "images" / f"{number}.png")
        Image.fromarray(labels).save(root / "labels" / f"{number}.png")
    return root


def attentive_loss(net: Net, batch, key):
    """With a part of all that options change: products, sums, random numbers, a softmax, an order."""
    for_noise, for_order = jax.random.split(key)
    x = jnp.concatenate([batch["x"], 0.1 * jax.random.normal(for_noise, batch["x"].shape)])
    x = x[jax.random.permutation(for_order, len(x))]
    hidden = jnp.tanh(net.up(x))
    attended = jax.nn.softmax(hidden @ hidden.T, axis=-1) @ hidden
    half = x.astype(jnp.bfloat16).sum(axis=-1, keepdims=True)
    return jnp.square(net.down(attended) - half.astype(jnp.float32)).mean(), {}


@pytest.fixture(scope="module")
def everything(pipe, root, tmp_path_factory) -> Callable[[], dict[str, Any]]:
    """The bytes of one segmentation with and without names, of one evaluation, and of a model after ten steps."""
    settings = Settings((0,), (8,), (5,), batch_size=2, unsupervised=(UnsupervisedProtocol(0.02),))
    task = make_task(loss=attentive_loss)

    def run() -> dict[str, Any]:
        seen = {"block": 0, "seed": 3, "size": (SQUARE, SQUARE)}
        named = pipe.segment(an_image(70, 90), NAMES, **seen)
        nameless = pipe.segment_unsupervised(an_image(70, 90), **seen, threshold=0.02)
        evaluation = evaluate(pipe, folder_benchmark(root), settings)
        rows = [*evaluation.rows, *evaluation.baselines]
        out = tmp_path_factory.mktemp("run")
        model = train(task, make_run(out, steps=10, checkpoint_every=100, evaluate_every=100), OPTIMIZER)
        noise = np.asarray(image_noise(4, [2, 9], (3, 5, 16)))
        arrays = [noise, named.scores, named.labels, nameless.maps, nameless.labels]
        arrays += [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
        return {
            "arrays": [(array.dtype.name, array.shape, array.tobytes()) for array in arrays],
            "rows": [row.metrics for row in rows],
        }

    return run


@pytest.fixture(scope="module")
def plain(everything) -> dict[str, Any]:
    return everything()


@pytest.mark.parametrize(("option", "value"), CASES, ids=[f"{option}={value}" for option, value in CASES])
def test_results_do_not_depend_on_how_jax_is_set_up(plain, everything, option, value):
    if option not in jax.config.values:
        pytest.skip(f"jax {jax.__version__} has no such option")
    with set_to(option, value):
        found = everything()
    assert found["rows"] == plain["rows"]
    assert found["arrays"] == plain["arrays"]


def test_every_option_of_jax_is_known_and_has_one_treatment():
    left = [option for options in LEFT.values() for option in options.split()]
    assert len({*left, *FIXED}) == len(left) + len(FIXED)
    assert OTHERWISE.keys() == FIXED.keys()
    if not jax.__version__.startswith(KNOWN):
        pytest.skip(f"jax {jax.__version__} is newer than the table: go through its options that the table lacks")
    assert jax.config.values.keys() <= {*left, *FIXED}, "say in seg4diff_jax.numerics what becomes of it"


def test_settled_is_what_a_program_has_that_sets_nothing_in_its_own_thread_alone():
    seen = {}

    def look() -> dict[str, Any]:
        return {"dtype": jnp.arange(2).dtype.name, "key": jax.random.key_data(jax.random.key(5)).tolist()}

    def elsewhere() -> None:
        seen["other thread"] = look()

    usual = look()
    with set_to("jax_enable_x64", True), set_to("jax_random_seed_offset", 1):
        other = look()
        with settled():
            seen["settled"] = look()
            thread = Thread(target=elsewhere)
            thread.start()
            thread.join()
        seen["after"] = look()
    assert usual == {"dtype": "int32", "key": [0, 5]}
    assert seen == {"settled": usual, "other thread": other, "after": other}
    assert other == {"dtype": "int64", "key": [0, 6]}


def test_arrays_of_64_bits_are_taken_as_those_of_32(pipe):
    noise = np.random.default_rng(0).standard_normal((SQUARE // 8, SQUARE // 8, 16)).astype(np.float32)
    how = {"block": 0, "size": (SQUARE, SQUARE)}
    expected = pipe.segment(an_image(70, 90), NAMES, noise=noise, **how)
    with set_to("jax_enable_x64", True):
        found = pipe.segment(an_image(70, 90), NAMES, noise=noise.astype(np.float64), **how)
    assert found.scores.dtype == np.float32
    assert found.scores.tobytes() == expected.scores.tobytes()


def test_the_options_values_are_jaxs_own_defaults():
    changed = re.compile("x64|matmul|prng|threefry")  # which the environment may say, as some runs of the tests do
    for option, value in FIXED.items():
        if option in jax.config.values and not changed.search(option) and option != "jax_transfer_guard":
            assert jax.config.values[option] == value, option
