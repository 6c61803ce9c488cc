"""MAGNET as people start it: `train.py` with our configurations on their own files; and its optimizer's options."""

from __future__ import annotations

import re
from contextlib import nullcontext, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.command_line.train import main, parse
from seg4diff_jax.convert.__main__ import main as convert
from seg4diff_jax.convert.lora.adapters import load_lora, read_lora
from seg4diff_jax.data.coco import IDS
from seg4diff_jax.data.loader import training_batches
from seg4diff_jax.magnet.encoded_items import encoded_ids
from seg4diff_jax.magnet.objective import MagnetBatch, MagnetObjective, magnet_loss
from seg4diff_jax.magnet.task import task
from seg4diff_jax.miniature.world.shapes import scene, write_folder
from seg4diff_jax.models.lora import LoRAConfig, apply_lora
from seg4diff_jax.parallel import make_mesh
from seg4diff_jax.training.optimizers import OptimizerConfig, make_optimizer
from seg4diff_jax.training.state import initial_state, take_apart
from seg4diff_jax.training.step import training_step
from tests.reference.adapters import RANK, factors, release_names, write_release
from tests.reference.checkpoints import JOINT_WIDTH, POOLED_WIDTH
from tests.reference.magnet_batch import BLOCK, TRAINABLE, Trained, make_batch
from tests.reference.magnet_runs import arguments, rows
from tests.reference.mmdit import SMALL, make_pair
from tests.reference.nameless import write_nameless
from tests.reference.processes import ROOT

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("masks") / "folder"
    write_folder(place, [scene("train", index, 64) for index in range(6)])
    return place


@pytest.fixture(scope="module")
def common(sd3_checkpoint) -> dict:
    sizes = {"data.size": SIZE, "run.steps": 2, "run.batch_size": 2, "run.log_every": 1, "run.evaluate_every": 2}
    return sizes | {"model": str(sd3_checkpoint), "block": 4, "optimizer.accumulate": 1, "optimizer.warmup": 0}


def trained(name: str, common: dict, out: Path, changes: dict, remark: str = "") -> list[dict]:
    """Two steps of `configs/magnet/NAME.yaml` by what `train.py` calls; its log. `remark`: of what they warn."""
    options = arguments(common | changes | {"run.out": str(out)})
    warned = pytest.warns(UserWarning, match=re.escape(remark)) if remark else nullcontext()
    with warned, redirect_stderr(StringIO()) as said:
        code = main([f"--config={ROOT / 'configs/magnet' / name}.yaml", *options])
    assert code == 0, said.getvalue()[-6000:]
    steps = [row for row in rows(out) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert {"velocity", "focal", "dice", "learning_rate"} < row.keys()
        assert all(np.isfinite(value) for value in row.values())
    assert steps[1]["images_per_second"] > 0
    assert 0 < steps[1]["fraction_of_peak"] < 1
    assert all(factor.dtype == np.float32 for pair in load_lora(out)[1].values() for factor in pair)
    return rows(out)


def test_a_folder_of_ones_own_goes_on_from_the_releases_adapters(common, folder, tmp_path):
    release = write_release(tmp_path / "lora_weights.pth", release_names(factors()))
    plain, adapted = (s4d.load(common["model"], lora=lora) for lora in (None, release))
    picture = scene("train", 0, 64)
    scores = [p.segment(picture.image, ["ball", "sand"], block=4, size=(64, 64)).scores for p in (plain, adapted)]
    assert np.abs(scores[0] - scores[1]).max() > 1e-4
    changes = {"data.name": "folder", "data.root": str(folder), "held_out.count": 2, "dtype": "float32"}
    changes |= {"start": str(release), "lora.rank": RANK, "run.workers": 1}
    log = trained("coco", common, tmp_path / "run", changes)
    assert log[-1]["validation/base_miou"] >= 0
    before, after = load_lora(release)[1], load_lora(tmp_path / "run")[1]
    rate = 1e-5  # of coco.yaml; Adam's first updates are as large
    for name, pair in before.items():
        moved = [np.abs(new - old).max() for old, new in zip(pair, after[name], strict=True)]
        assert all(0.5 * rate < each < 3 * rate for each in moved), name
    assert convert(["lora", str(tmp_path / "run"), str(tmp_path / "diffusers.safetensors")]) == 0
    written = read_lora(tmp_path / "diffusers.safetensors")
    assert written.format == "diffusers"
    for name, pair in written.adapters.items():
        for theirs, ours in zip(pair, after[name], strict=True):
            np.testing.assert_array_equal(theirs, ours)


def test_coco_in_bfloat16_is_scored_on_held_out_pictures(common, tmp_path):
    values = [IDS_OF[0], IDS_OF[3], 255]
    for year, count in (("train2017", 3), ("val2017", 2)):
        for number in range(count):
            shown = scene("train", number, 64)
            for place, suffix, pixels in (
                (year, "jpg", shown.image),
                (f"stuffthingmaps/{year}", "png", np.choose(shown.labels % 3, values).astype(np.uint8)),
            ):
                (tmp_path / "coco" / place).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / "coco" / place / f"{number:012d}.{suffix}")
    changes = {"data.root": str(tmp_path / "coco"), "held_out.count": 2, "held_out.batch_size": 2}
    log = trained("coco", common, tmp_path / "run", changes)
    assert log[-1]["validation/velocity_loss"] > 0


IDS_OF = [category - 1 for category in IDS if category]
"""Values of COCO-Stuff's maps."""


def test_masks_without_names_name_the_pictures_without_a_caption(common, tmp_path):
    from pycocotools import mask as run_lengths

    write_nameless(tmp_path, run_lengths)
    changes = {"data.root": str(tmp_path), "data.captions": str(tmp_path / "captions.json"), "data.rows": 4}
    remark = "1 of 2 pictures have no caption: prompt '' for sa_2"
    trained("sa1b", common, tmp_path / "run", changes, remark)


def test_scenes_with_t5_in_bfloat16_from_a_cache_make_pictures(common, tmp_path):
    changes = {"data.scenes": 4, "held_out.count": 2, "held_out.batch_size": 2, "held_out.sigmas": [], "t5": True}
    changes |= {"dtype": "bfloat16", "cache": str(tmp_path / "cache"), "samples.count": 2, "samples.steps": 2}
    trained("miniature", common, tmp_path / "run", changes)
    assert Image.open(tmp_path / "run/pictures.png").width == 2 * 128


# ---- without a run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(common, folder) -> dict:
    return common | {"task": "magnet", "run.out": "unused", "data.root": str(folder), "held_out.count": 2}


def config_of(options: dict, **changes):
    return parse(arguments(options | changes)).config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_fp32_and_the_base_is_of_its_dtype(options, dtype):
    made = task(config_of(options, dtype=dtype, t5=True))
    _, trainable, frozen = take_apart(made.init(0, make_mesh()), made.trainable)
    assert {array.dtype.name for array in trainable.values()} == {"float32"}
    assert {array.dtype.name for array in frozen.values()} == {dtype}
    assert {name.removeprefix("encoders.").split(".")[0] for name in frozen} == {
        *("transformer", "vae", "clip_l", "clip_g", "t5")
    }


def test_context_is_as_long_with_t5_as_with_the_zeros_in_its_place(options):
    shapes = []
    for t5 in (False, True):
        config = config_of(options, t5=t5)
        made = task(config)
        model = made.init(0, make_mesh())
        batch = next(training_batches(made.source, batch_size=2, seed=0, augment=made.augment))
        encode = partial(encoded_ids, joint_dim=JOINT_WIDTH)
        texts = jax.eval_shape(encode, model.encoders, batch)
        shapes.append((jax.eval_shape(lambda t: t.full_context, texts).shape, texts.pooled.shape))
    assert shapes == [((2, 154, JOINT_WIDTH), (2, POOLED_WIDTH))] * 2


def test_worker_processes_make_the_same_batches(options):
    made = task(config_of(options))
    take = lambda workers: training_batches(made.source, batch_size=2, seed=3, augment=made.augment, workers=workers)
    batches, others = take(0), take(2)
    for _ in range(3):
        one, other = next(batches), next(others)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_the_head_has_a_rate_of_its_own_and_the_base_no_moments(options):
    changes = {"objective.mask_head": "conv", "optimizer.rates": {"^head": 0.1}, "optimizer.weight_decay": 0.5}
    config = config_of(options, **changes, **{"optimizer.clip": None})
    made = task(config)
    _, trainable, frozen = take_apart(made.init(0, make_mesh()), made.trainable)
    optimizer = make_optimizer(config.optimizer, 10)
    state = optimizer.init(trainable)
    sized = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(sized) == 2 * sum(array.size for array in trainable.values())
    assert not frozen.keys() & trainable.keys()
    rate = config.optimizer.learning_rate

    update = jax.jit(lambda gradient: optimizer.update(gradient, state, trainable)[0])

    def moved(gradient) -> dict[str, np.ndarray]:
        return {name: np.asarray(each) for name, each in update(gradient).items()}

    still = moved(jax.tree.map(jnp.zeros_like, trainable))
    for name, change in moved(jax.tree.map(jnp.ones_like, trainable)).items():
        factor = 0.1 if name.startswith("head") else 1.0
        decayed = 0.0 if name.endswith("bias") else 0.5 * np.asarray(trainable[name])
        np.testing.assert_allclose(change, -factor * rate * (1 + decayed), rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(still[name], -factor * rate * decayed, rtol=1e-5, err_msg=name)


def test_accumulated_batches_equal_one_that_holds_them_all():
    """Of pictures with as many masks each: the losses of masks are means over a batch's masks."""
    theirs_lora, objective = LoRAConfig(rank=2, alpha=2.0), MagnetObjective()
    base = make_pair(SMALL)[1]
    rng = np.random.default_rng(0)
    width = SMALL["num_attention_heads"] * SMALL["attention_head_dim"]
    layers = [f"blocks.{i}.{target}" for i in range(SMALL["num_layers"]) for target in theirs_lora.targets]
    drawn = {layer: (rng.normal(size=(width, 2)) / width**0.5, 0.1 * rng.normal(size=(2, width))) for layer in layers}
    structure, trainable, frozen = take_apart(Trained(apply_lora(base, theirs_lora, drawn)), TRAINABLE)
    whole = make_batch(objective)._replace(real=jnp.ones((2, 3), bool))._asdict()
    halves = [jax.tree.map(lambda array, i=i: array[i : i + 1], whole) for i in range(2)]

    def loss(model, batch, key):
        return magnet_loss(model.transformer, MagnetBatch(**batch), objective, block=BLOCK)

    found = []
    for batches in ([whole], halves):
        # With so large an epsilon updates are as large as gradients: Adam then does not make rounding errors larger.
        how = {"weight_decay": 0.1, "clip": 0.5, "epsilon": 1.0, "average": 0.5}
        config = OptimizerConfig(1.0, "constant", accumulate=len(batches), **how)
        optimizer = make_optimizer(config, 10)
        state = initial_state(trainable, optimizer, average=True, key=jax.random.key_data(jax.random.key(0)))
        step = jax.jit(lambda *given, c=config, o=optimizer: training_step(loss, structure, o, c, *given))
        for batch in batches:
            state, metrics = step(state, frozen, batch)
            assert metrics["gradient_norm"] > 0.5, "so that clipping does something"
        found.append(state)
    for name, before in trainable.items():
        one, other = (np.asarray(state.trainable[name]) for state in found)
        assert np.abs(one - before).max() > 1e-3
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one - before).max(), name
        np.testing.assert_allclose(*(np.asarray(state.average[name]) for state in found), rtol=1e-5, atol=1e-6)
