"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, in fp32, with shapes in signatures checked at each call."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reference.processes import QUICK_TO_COMPILE, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported: threads of small matrices wait, busily
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One place for a run's programs, which its workers and all processes that they start share. It is gone at the end.
    place = tempfile.mkdtemp(prefix="seg4diff-jax-tests-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = place
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ |= flags(QUICK_TO_COMPILE)

import jax
from jaxtyping import install_import_hook
from PIL import Image


def modules_with_shapes() -> list[str]:
    """Those of the package whose signatures say shapes. To check the others costs tests of checkpoints a fifth."""
    root = Path(__file__).parents[1]
    folders = os.walk(root / "seg4diff_jax", followlinks=True)
    files = (Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py"))
    shaped = [file for file in files if "from jaxtyping import" in file.read_text("utf-8")]
    return [".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in shaped]


install_import_hook(modules_with_shapes(), "beartype.beartype")


def pack_pictures_quickly() -> None:
    """Pictures have the same pixels in somewhat larger files. To pack them well is up to half of a command's time."""
    save = Image.Image.save
    Image.Image.save = lambda picture, *where, **how: save(picture, *where, **how | {"compress_level": 1})


pack_pictures_quickly()

LONGEST = [
    *("magnet/sharded", "models/mmdit", "readme", "miniature/training", "generation", "training/sharded"),
    "command_line/generate_many",
    *("magnet/interrupted", "magnet/configurations", "evaluation/evaluate_spread", "evaluation/evaluate"),
    *("magnet/training", "models/vae", "evaluation/zero_shot", "magnet/step", "benchmark_scripts", "training/loop"),
    *("models/lora", "parallel_numbers", "evaluation/single_objects", "pipeline"),
]
"""Files that take half a minute and more, the longest first: one that comes last leaves the other workers idle."""


def pytest_configure(config: pytest.Config) -> None:
    """PyTorch computes on one thread: of small models several take more time to wait for each other than they save.

    Workers take files in the order of collection, not those with the most tests first.
    """
    if config.option.markexpr != "slow":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    places = {tests / Path(name).with_name(f"test_{Path(name).name}.py"): place for place, name in enumerate(LONGEST)}
    assert all(file.is_file() for file in places)
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    keep_out_of_collections()
    gc.set_threshold(10_000, 20, 20)


def keep_out_of_collections() -> None:
    """Garbage collections, of which each loaded checkpoint makes one, leave out what is imported by now and stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """A process may map only so many pieces of memory, and each compiled program takes several."""
    keep_out_of_collections()
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def checkpoint_factory(tmp_path_factory) -> Callable[..., Path]:
    """`tests.reference.checkpoints.make_checkpoint` without the directory; equal options share one checkpoint."""
    made: dict[tuple, Path] = {}

    def make(**options) -> Path:
        from tests.reference.checkpoints import make_checkpoint

        key = tuple(sorted(options.items(), key=lambda item: item[0]))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def sd3_checkpoint(checkpoint_factory) -> Path:
    """A small random SD3-medium with T5, in diffusers' format. Tests must not write to it."""
    return checkpoint_factory(variant="sd3")


@pytest.fixture(scope="session")
def sd35_medium_checkpoint(checkpoint_factory) -> Path:
    return checkpoint_factory(variant="sd3.5-medium")


@pytest.fixture(scope="session")
def sd35_large_checkpoint(checkpoint_factory) -> Path:
    return checkpoint_factory(variant="sd3.5-large")


@pytest.fixture(scope="session")
def sd3(sd3_checkpoint):
    """The small SD3-medium, loaded in fp32 without T5."""
    import seg4diff_jax

    return seg4diff_jax.load(sd3_checkpoint)
