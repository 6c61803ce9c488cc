"""MAGNET as a task: it learns masks, leaves the checkpoint alone, goes on bit for bit, and others read its adapters."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from flax import nnx
from safetensors.torch import save_file

import seg4diff_jax as s4d
from seg4diff_jax.command_line.train import main, parse
from seg4diff_jax.convert.__main__ import main as convert
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.lora.adapters import attach_lora, load_lora, read_lora
from seg4diff_jax.data.loader import training_batches
from seg4diff_jax.magnet.adapter_files import fill_head, head_tensors
from seg4diff_jax.magnet.task import TRAINABLE, MagnetConfig, loss, open_checkpoint, task
from seg4diff_jax.miniature.world.shapes import scene, write_folder
from seg4diff_jax.models.lora import lora_state, remove_lora
from seg4diff_jax.models.mask_head import MaskHead
from seg4diff_jax.parallel import make_mesh
from seg4diff_jax.training.optimizers import make_optimizer
from seg4diff_jax.training.state import initial_state, take_apart
from seg4diff_jax.training.step import training_step
from tests.reference import diffusers_pictures
from tests.reference.adapters import RANK, factors, mask_head, release_names, write_release
from tests.reference.checkpoints import JOINT_WIDTH, POOLED_WIDTH
from tests.reference.mmdit import forward, make_inputs, run_torch
from tests.reference.random_weights import relative_error

ROOT = Path(__file__).parents[2]
BLOCK = 3


@pytest.fixture(scope="module")
def options(sd3_checkpoint, tmp_path_factory) -> dict:
    """Of a small run on a folder of scenes."""
    folder = tmp_path_factory.mktemp("masks") / "folder"
    write_folder(folder, [scene("train", index, 64) for index in range(6)])
    return {
        "task": "magnet",
        "model": str(sd3_checkpoint),
        "block": BLOCK,
        "data.root": str(folder),
        "data.size": 64,
        "held_out.count": 2,
        "held_out.batch_size": 2,
        "lora.rank": 2,
        "lora.alpha": 4.0,
        "run.steps": 40,
        "run.batch_size": 4,
        "run.log_every": 1,
        "run.evaluate_every": 20,
        "run.checkpoint_every": 20,
        "optimizer.learning_rate": 0.01,
        "optimizer.schedule": "constant",
        "objective.velocity_weight": 0.001,
        "objective.masks_from": "log_probs",
    }


def arguments(options: dict) -> list[str]:
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return [f"--{key}={value}" for key, value in text.items()]


def config_of(options: dict, **changes) -> MagnetConfig:
    return parse(arguments({"run.out": "unused"} | options | changes)).config


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(options, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "magnet"
    assert main(arguments(options | {"run.out": str(out)})) == 0
    return out


def test_masks_are_learnt(run):
    steps = [row for row in rows(run) if "focal" in row]
    assert len(steps) == 40
    last = lambda name: np.mean([row[name] for row in steps[-8:]])
    assert last("focal") < 0.8 * steps[0]["focal"]  # whose adapters change nothing yet
    assert last("dice") < 0.97 * steps[0]["dice"]


def test_held_out_pictures_are_scored_with_the_adapters_and_without(run, options):
    scores = [row for row in rows(run) if "validation/miou" in row]
    assert [row["step"] for row in scores] == [20, 40]
    for name in ("miou", "velocity_loss"):
        base, adapted = ([row[f"validation/{kind}{name}"] for row in scores] for kind in ("base_", ""))
        assert base[0] == base[1] not in adapted
    pipe = s4d.load(options["model"], lora=run / "export")
    plain = s4d.load(options["model"])
    shown = scene("train", 0, 64)
    maps = [p.segment(shown.image, ["ball", "sand"], block=BLOCK, size=(64, 64)).scores for p in (pipe, plain)]
    assert np.abs(maps[0] - maps[1]).max() > 1e-4


def test_adapters_of_checkpoints_are_found_by_step_and_score(run, tmp_path, capsys):
    """Without an average; the export is of the last step."""
    scores = {row["step"]: row["validation/miou"] for row in rows(run) if "validation/miou" in row}
    best = max(scores, key=lambda step: (scores[step], step))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run / "checkpoints", unfinished / "checkpoints")
    for which in ("20", "40", "best"):
        assert convert(["lora", str(unfinished), str(tmp_path / f"{which}.safetensors"), "--checkpoint", which]) == 0
    capsys.readouterr()
    found = {which: load_lora(tmp_path / f"{which}.safetensors")[1] for which in ("20", "40", "best")}
    found["export"] = load_lora(run / "export")[1]
    bytes_of = {which: [factor.tobytes() for pair in each.values() for factor in pair] for which, each in found.items()}
    assert bytes_of["40"] == bytes_of["export"] != bytes_of["20"]
    assert bytes_of["best"] == bytes_of[str(best)]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ([], "a training run that is not finished: take the adapters of one of its checkpoints"),
        (["--checkpoint", "30"], "has no checkpoint 30: give last, best or one of 20, 40"),
        (
            ["--checkpoint", "best"],
            "none of the checkpoints 20, 40 was evaluated to a finite mIoU: give last or a step",
        ),
        (["--checkpoint", "20"], "20/config/metadata: not JSON"),
        (["--checkpoint", "40", "--alpha", "3"], "a checkpoint says its alpha"),
    ],
)
def test_checkpoints_that_give_no_adapters_are_refused(chosen, said, run, tmp_path, capsys):
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    for step in ("20", "40"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step / "metrics")
    (tmp_path / "run" / "checkpoints" / "20" / "config" / "metadata").write_text("{")
    assert convert(["lora", str(tmp_path / "run"), str(tmp_path / "to.safetensors"), *chosen]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "to.safetensors").exists()


def test_diffusers_loads_the_export_and_computes_the_same_velocity(run, sd3_checkpoint, tmp_path):
    target = tmp_path / "diffusers.safetensors"
    assert convert(["lora", str(run / "export"), str(target)]) == 0
    assert read_lora(target).format == "diffusers"
    inputs = make_inputs(
        {"in_channels": 16, "joint_attention_dim": JOINT_WIDTH, "pooled_projection_dim": POOLED_WIDTH}, (8, 8), text=12
    )
    base = load_component(sd3_checkpoint, "transformer")
    ours = forward(attach_lora(base, run / "export"), inputs)[0]
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_checkpoint)
    with torch.no_grad():
        plain = run_torch(pipeline.transformer, inputs)
        pipeline.load_lora_weights(target)
        expected = run_torch(pipeline.transformer, inputs)
    assert relative_error(plain.numpy(), expected) > 1e-2
    assert relative_error(ours, expected) <= 1e-5


def test_diffusers_makes_our_picture_with_a_runs_adapters(run, sd3_checkpoint, tmp_path):
    target = tmp_path / "mine.safetensors"
    assert convert(["lora", str(run), str(target)]) == 0
    pipeline = diffusers_pictures.loaded(sd3_checkpoint)
    plain = diffusers_pictures.theirs(pipeline)
    pipeline.load_lora_weights(target)
    expected = diffusers_pictures.theirs(pipeline)
    assert np.abs(expected - plain).max() > 10
    assert np.abs(diffusers_pictures.ours(s4d.load(sd3_checkpoint, lora=run)) - expected).max() <= 1


# ---- what a step holds ----------------------------------------------------------------------------------------------


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Of everything that a program computes, those inside its loops too."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(variable.aval.shape) for variable in equation.outvars}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= shapes_in(inner)
    return found


def test_a_step_computes_nothing_of_the_bases_size(options):
    config = config_of(options)
    made = task(config)
    model = made.init(0, make_mesh())
    batch = next(training_batches(made.source, batch_size=4, seed=0, augment=made.augment))

    def step_of(trained):
        structure, trainable, frozen = take_apart(model, trained)
        optimizer = make_optimizer(config.optimizer, 12)
        state = initial_state(trainable, optimizer, average=False, key=jax.random.key_data(jax.random.key(0)))
        step = partial(training_step, made.loss, structure, optimizer, config.optimizer)
        return state, jax.make_jaxpr(step)(state, frozen, batch).jaxpr, frozen

    state, program, frozen = step_of(TRAINABLE)
    assert all(".lora_" in name for name in state.trainable)
    size = lambda arrays: sum(array.size for array in jax.tree.leaves(arrays))
    assert size(state) < 0.1 * size({k: v for k, v in frozen.items() if k.startswith("transformer")})
    kernel = frozen["transformer.stacks.0.image.mlp.up.kernel"].shape
    assert kernel not in shapes_in(program)
    everything = nnx.Any(TRAINABLE, nnx.All(nnx.PathContains("transformer"), nnx.Param))
    assert kernel in shapes_in(step_of(everything)[1])


def test_the_base_is_not_touched(run, options):
    made = task(config_of(options, start=str(run / "export")))
    transformer = made.init(0, make_mesh()).transformer
    base = nnx.state(load_component(options["model"], "transformer", dtype=jnp.float32))
    for ours, theirs in zip(jax.tree.leaves(nnx.state(remove_lora(transformer))), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("positions", ["span", "release"])
def test_losses_are_the_same_with_and_without_a_cache(options, tmp_path, positions):
    found, flipped = [], []
    for cache in (None, str(tmp_path / "cache")):
        fixed = {"data.crop": "center", "cache": cache, "positions": positions, "objective.masks_from": "scores"}
        config = config_of(options, **fixed)
        made, checkpoint = task(config), open_checkpoint(config)
        model = made.init(0, make_mesh())
        assert (model.encoders is None) == (cache is not None)
        score = jax.jit(partial(loss, config=config, checkpoint=checkpoint))
        batches = training_batches(made.source, batch_size=4, seed=0, augment=made.augment)
        shown = [next(batches) for _ in range(4)]  # more than an epoch: one picture comes both ways
        flipped.append(np.stack([batch["labels"] for batch in shown]))
        found.append([[float(x) for x in jax.tree.leaves(score(model, batch, jax.random.key(1)))] for batch in shown])
    np.testing.assert_array_equal(*flipped)
    np.testing.assert_allclose(*found, rtol=3e-3)  # the cache holds fp16
    other = task(config_of(options, **{"data.crop": "center", "data.flip": False}))
    straight = training_batches(other.source, batch_size=4, seed=0, augment=other.augment)
    assert any((next(straight)["labels"] != batch).any() for batch in flipped[0])


# ---- masks without names, the release's head, going on from a file --------------------------------------------------


@pytest.fixture(scope="module")
def nameless(options, tmp_path_factory) -> dict:
    from pycocotools import mask as run_lengths

    from tests.reference.nameless import write_nameless

    folder = tmp_path_factory.mktemp("sa1b")
    write_nameless(folder, run_lengths)
    changes = {"data.name": "sa1b", "data.root": str(folder), "data.captions": str(folder / "captions.json")}
    changes |= {"objective.targets": "matching", "objective.masks_from": "scores", "objective.mask_head": "conv"}
    changes |= {"objective.focal": "release", "run.steps": 2, "run.batch_size": 2, "data.rows": 4}
    return options | changes


def test_the_head_is_exported_beside_the_adapters_and_trained_on(nameless, sd3_checkpoint, tmp_path):
    first = tmp_path / "first"
    assert main(arguments(nameless | {"run.out": str(first)})) == 0
    assert {path.name for path in (first / "export").iterdir()} == {"adapters.safetensors", "mask_head.safetensors"}
    s4d.load(sd3_checkpoint, lora=first / "export")
    went_on = task(config_of(nameless, start=str(first / "export"))).init(0, make_mesh())
    fresh = task(config_of(nameless)).init(0, make_mesh())
    heads = [np.asarray(model.head.layers[0].kernel) for model in (went_on, fresh)]
    assert np.abs(heads[0] - heads[1]).max() > 1e-4
    with pytest.raises(ValueError, match=r"has a mask head and objective\.mask_head is null"):
        task(config_of(nameless, start=str(first / "export"), **{"objective.mask_head": None})).init(0, make_mesh())
    with pytest.raises(ValueError, match=r"lora\.rank is 3, theirs 2"):
        task(config_of(nameless, start=str(first / "export"), **{"lora.rank": 3})).init(0, make_mesh())


def test_training_goes_on_from_the_releases_file(options, tmp_path):
    tensors, head = factors(), mask_head()
    source = write_release(tmp_path / "lora_weights.pth", release_names(tensors) | head)
    changes = {"lora.rank": RANK, "lora.alpha": 16.0, "objective.masks_from": "scores", "objective.mask_head": "conv"}
    model = task(config_of(options, start=str(source), **changes)).init(0, make_mesh())
    a, b = lora_state(model.transformer)["blocks.2.image.attention.q"]
    np.testing.assert_array_equal(a.T, tensors["transformer_blocks.2.attn.to_q.lora_A.weight"])
    np.testing.assert_array_equal(b.T, tensors["transformer_blocks.2.attn.to_q.lora_B.weight"])
    for name, tensor in head_tensors(model.head).items():
        np.testing.assert_array_equal(tensor, head[name])


def test_layers_that_a_file_lacks_begin_as_fresh_ones(options, tmp_path):
    """A and B of zeros would never be trained: each one's gradient is a product with the other."""
    absent = "transformer_blocks.2.attn.to_q"
    tensors = {name: tensor for name, tensor in factors().items() if not name.startswith(absent)}
    save_file({f"transformer.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    changes = {"lora.rank": RANK, "lora.alpha": float(RANK)}
    model = task(config_of(options, start=str(tmp_path / "lora.safetensors"), **changes)).init(0, make_mesh())
    state = lora_state(model.transformer)
    a, b = state["blocks.2.image.attention.q"]
    assert np.std(a) == pytest.approx(1 / RANK, rel=0.2)
    assert not np.any(b)
    a, _ = state["blocks.2.image.attention.k"]
    np.testing.assert_array_equal(a.T, tensors["transformer_blocks.2.attn.to_k.lora_A.weight"])


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 6}, "block is 6; .* has blocks 0..5"),
        ({"block": None}, "does not say which block segments best"),
        ({"data.size": 72}, "data.size is 72 x 72; sides must be multiples of 16, up to 384"),
        ({"held_out.count": 6}, "nothing is left to train on"),
        ({"held_out.name": "folder"}, "held_out names the pictures that are trained on"),
        ({"held_out.split": "val"}, "held_out.split is given, and a folder has none"),
        ({"held_out.batch_size": 0}, "held_out.batch_size is 0"),
        ({"held_out.sigmas": [3.0]}, "held_out.sigmas are"),
        ({"held_out.count": 0, "samples.count": 1}, "samples show prompts of held-out pictures, and none are"),
        ({"data.labels": "all"}, "folder has one kind of labels"),
        ({"data.least_area": 5}, "data.least_area is 5"),
        ({"optimizer.clip": 0}, "optimizer.clip is 0.0; expected a finite number, more than 0, or null"),
        ({"optimizer.learning_rate": -1}, "optimizer.learning_rate is -1.0"),
        ({"optimizer.average": 1.5}, "optimizer.average is 1.5"),
        ({"optimizer.rates": {"(": 2.0}}, "'\\(' is no regular expression"),
        ({"noise_levels.std": -1}, "noise_levels.std is -1.0"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: cannot be read: No such file or directory"),
        ({"cache": "somewhere"}, "a cache holds one view of each picture"),
        (
            {"objective.targets": "matching", "objective.masks_from": "scores"},
            "masks of sa1b and of captioned pictures have no names",
        ),
        ({"data.name": "coco-17"}, "data.name is 'coco-17': expected one of folder"),
        ({"data.name": "voc-single"}, "data.name is 'voc-single', whose labels are foreground and background"),
        ({"data.split": "val"}, "folder has no splits"),
        ({"lora.targets": ["image.attention.z"]}, r"no adapted block has a linear layer image\.attention\.z"),
        ({"model": "nowhere"}, "nowhere: no such file or directory"),
    ],
)
def test_options_that_cannot_be_used_are_refused_in_a_sentence(options, changes, message, tmp_path, capsys):
    try:
        status = main(arguments(options | changes | {"run.out": str(tmp_path / "run")}))
    except SystemExit as exit:  # what the options contradict by themselves, the parser says
        status = exit.code
    assert status not in (0, None)
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("name", ["coco", "coco_release", "sa1b", "sa1b_release", "miniature"])
def test_every_configuration_is_understood(name):
    parsed = parse([f"--config={ROOT / 'configs' / 'magnet' / name}.yaml"])
    assert parsed.task == "magnet"
    config = parsed.config
    assert (config.lora.rank, config.lora.alpha) == (16, 16)
    assert (config.objective.mask_head == "conv") == name.endswith("release")


def test_integers_are_no_mask_head():
    head = MaskHead(rngs=nnx.Rngs(0))
    whole = {name: array.astype(np.int32) for name, array in head_tensors(head).items()}
    with pytest.raises(ValueError, match=r"a\.safetensors: its mask head has \S+weight \(int32\), .*floating-point"):
        fill_head(head, whole, "a.safetensors")
