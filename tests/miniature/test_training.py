"""The miniature's three tasks, very small, one after the other: each learns, and together they make an SD3."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from flax import nnx
from PIL import Image
from transformers import CLIPVisionModelWithProjection

import seg4diff_jax as s4d
from seg4diff_jax.command_line.train import main, parse
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.data.loader import evaluation_batches
from seg4diff_jax.flow import image_noise
from seg4diff_jax.miniature.autoencoder import latent_moments
from seg4diff_jax.miniature.contrastive import penultimate_size, with_unit_states
from seg4diff_jax.miniature.flow_matching import InMemory, Objective, init, loss, with_latents
from seg4diff_jax.miniature.grounding import grounding, grounding_item
from seg4diff_jax.miniature.scenes import SceneConfig, SceneItems, captioned, training_scenes
from seg4diff_jax.miniature.world.shapes import CLASSES, scene
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.encoders import TokenIds
from seg4diff_jax.parallel import make_mesh
from seg4diff_jax.segmentation.metrics import mean_iou
from seg4diff_jax.text import load_tokenizers
from seg4diff_jax.training.sample_pictures import Denoiser

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "miniature"
SMALL = {
    "run.steps": 30,
    "run.batch_size": 8,
    "run.log_every": 5,
    "run.evaluate_every": 30,
    "run.checkpoint_every": 30,
    "optimizer.warmup": 3,
    "data.size": 32,
    "data.train": 64,
    "data.validation": 20,
    "data.cache": None,
    "dtype": "float32",
}
AUTOENCODER = SMALL | {
    "model.block_out_channels": [8, 8],
    "model.norm_num_groups": 4,
    "optimizer.learning_rate": 0.01,
    "measured": 64,
}
CONTRASTIVE = SMALL | {
    "data.train": 16,
    "clip_l.hidden_size": 16,
    "clip_l.intermediate_size": 32,
    "clip_g.hidden_size": 20,
    "clip_g.intermediate_size": 40,
    "vision.hidden_size": 24,
    "vision.intermediate_size": 48,
    "vision.num_hidden_layers": 1,
    "vision.image_size": 32,
    "optimizer.weight_decay": 0,
    "optimizer.learning_rate": 0.003,
}
FLOW_MATCHING = SMALL | {
    "model.num_layers": 2,
    "model.num_attention_heads": 2,
    "model.attention_head_dim": 16,
    "model.caption_projection_dim": 32,
    "optimizer.learning_rate": 0.01,
    "evaluation.batch_size": 8,
    "evaluation.sigmas": [0.3],
    "samples.count": 2,
    "samples.steps": 3,
    "start": None,
}
SPARSE = {"objective.image_tokens": 100, "prompts.tokens": 20}


def arguments(name: str, options: dict) -> list[str]:
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return [f"--config={CONFIGS / name}.yaml", *(f"--{key}={value}" for key, value in text.items())]


def train(name: str, out: Path, options: dict) -> Path:
    assert main(arguments(name, options | {"run.out": str(out)})) == 0
    return out


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    return train("autoencoder", tmp_path_factory.mktemp("autoencoder"), AUTOENCODER)


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory) -> Path:
    return train("contrastive", tmp_path_factory.mktemp("contrastive"), CONTRASTIVE)


@pytest.fixture(scope="module")
def parts(autoencoder, contrastive, tmp_path_factory) -> dict:
    cache = tmp_path_factory.mktemp("cache") / "latents"
    return FLOW_MATCHING | {"vae": f"{autoencoder}/export", "text": f"{contrastive}/export", "cache": str(cache)}


@pytest.fixture(scope="module")
def flow_matching(parts, tmp_path_factory) -> Path:
    return train("flow_matching", tmp_path_factory.mktemp("flow_matching"), parts)


@pytest.fixture(scope="module")
def sparse(parts, tmp_path_factory) -> Path:
    return train("flow_matching_sparse", tmp_path_factory.mktemp("sparse"), parts | SPARSE)


@pytest.mark.parametrize("task", ["autoencoder", "contrastive", "flow_matching", "sparse"])
def test_every_task_learns(task, request):
    losses = [row["loss"] for row in rows(request.getfixturevalue(task)) if "loss" in row]
    assert len(losses) == 6
    assert np.mean(losses[-2:]) < 0.8 * losses[0]


def test_flow_matching_goes_on_from_the_transformer_that_few_tokens_trained(parts, sparse, tmp_path):
    start = f"{sparse}/export"
    config = parse(arguments("flow_matching", parts | {"start": start})).config
    begun = nnx.state(init(config, 0, make_mesh()).transformer)
    exported = nnx.state(load_component(start, "transformer", dtype=jnp.float32))
    for mine, theirs in zip(jax.tree.leaves(begun), jax.tree.leaves(exported), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    run = train("flow_matching", tmp_path / "run", parts | {"start": start, "run.steps": 5})
    anew = [row["loss"] for row in rows(sparse) if "loss" in row]
    assert next(row["loss"] for row in rows(run) if "loss" in row) < anew[0]


def test_exported_latents_have_mean_zero_and_deviation_one(autoencoder):
    vae = load_component(autoencoder / "export", "vae", dtype=jnp.float32)
    mean, deviation = latent_moments(vae, SceneItems("train", 64, 32, ("image",)))
    assert vae.config.scaling_factor != 1
    assert abs(mean) < 0.01
    assert deviation == pytest.approx(1, abs=0.01)


def test_diffusers_reads_the_autoencoder(autoencoder):
    theirs = AutoencoderKL.from_pretrained(autoencoder / "export" / "vae", torch_dtype=torch.float32)
    ours = load_component(autoencoder / "export", "vae", dtype=jnp.float32)
    pixels = scene("test", 0, 32).image[None].astype(np.float32) / 127.5 - 1
    with torch.no_grad():
        mean = theirs.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist.mode()
        expected = (mean - theirs.config.shift_factor) * theirs.config.scaling_factor
    np.testing.assert_allclose(ours.encode(jnp.asarray(pixels)), expected.permute(0, 2, 3, 1), atol=1e-4)


def test_unit_states_change_nothing_but_the_penultimate_states_size():
    config = CLIPTextConfig(64, 16, 32, 2, 2, 8, projection_dim=8, eos_token_id=2, layer_norm_eps=1e-12)
    clip = CLIPText(config, rngs=nnx.Rngs(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (3, 8)))
    large = with_unit_states(clip, 0.2)
    size = penultimate_size(large, ids)
    before, after = large(ids), with_unit_states(large, size)(ids)
    assert size > 2
    assert np.sqrt(np.square(after.penultimate).mean()) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(after.penultimate, before.penultimate / size, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.pooled, before.pooled, rtol=1e-4, atol=1e-5)


def test_diffusers_generates_with_the_exported_checkpoint(flow_matching):
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        flow_matching / "export", text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a ball on grass", num_inference_steps=2, height=32, width=32, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert np.isfinite(images).all()
    encoder = CLIPVisionModelWithProjection.from_pretrained(flow_matching / "export" / "image_encoder")
    assert encoder.config.projection_dim == 128


def test_the_exported_checkpoint_segments(flow_matching):
    pipeline = s4d.load(flow_matching / "export")
    best = [row for row in rows(flow_matching) if "validation/miou" in row][-1]
    assert pipeline.expert_block == best["validation/block"]
    shown = scene("test", 0, 32)
    names = ["ball", "sand"]
    assert pipeline.segment(shown.image, names).labels.shape == shown.labels.shape


def test_pictures_of_a_run_are_those_that_its_checkpoint_generates(flow_matching):
    pipeline = s4d.load(flow_matching / "export")
    captions = [scene("validation", index, 32).caption for index in range(2)]
    row = np.asarray(Image.open(flow_matching / "pictures" / "00000030.png")).astype(int)
    expected = np.concatenate(pipeline.generate(captions, seed=0, steps=3, guidance=4.0), axis=1)
    other = np.concatenate(pipeline.generate(captions, seed=1, steps=3, guidance=4.0), axis=1)
    assert np.abs(row - expected).mean() < 1  # the export is in fp16
    assert np.abs(row - other).mean() > 5


def test_losses_are_the_same_with_and_without_cached_latents(parts, flow_matching):
    config = parse(arguments("flow_matching", parts | {"cache": None, "prompts.filled": 0, "run.out": "unused"})).config
    denoiser = init(config, 0, make_mesh())
    tokenizers = load_tokenizers(config.text)
    scenes = captioned(SceneItems("train", 4, 32, ("image", "caption")), tokenizers)
    (pixels, _), (latents,) = next(evaluation_batches(scenes, 4)), with_latents(denoiser.encoders.vae, scenes, 4)
    empty = TokenIds(pixels["clip_l"][:1], pixels["clip_g"][:1])
    score = jax.jit(partial(loss, objective=Objective(), empty=empty))
    cached, direct = (float(score(denoiser, batch, jax.random.key(0))[0]) for batch in (latents, pixels))
    assert cached == pytest.approx(direct, rel=2e-3)  # the cache holds fp16


def test_a_loss_on_some_tokens_is_that_of_all_when_all_are_seen(parts, flow_matching):
    config = parse(arguments("flow_matching", parts | {"run.out": "unused"})).config
    denoiser, tokenizers = init(config, 0, make_mesh()), load_tokenizers(config.text)
    denoiser = Denoiser(load_component(flow_matching / "export", "transformer"), denoiser.encoders)
    vae = load_component(config.vae, "vae", dtype=jnp.float32)
    scenes = captioned(SceneItems("train", 4, 32, ("image", "caption")), tokenizers)
    (batch,) = with_latents(vae, scenes, 4)
    empty = TokenIds(batch["clip_l"][:1], batch["clip_g"][:1])
    score = lambda count: jax.jit(partial(loss, objective=Objective(image_tokens=count), empty=empty))(
        denoiser, batch, jax.random.key(0)
    )
    (whole, _), (all_in_disorder, _), (some, _) = score(None), score(256), score(40)
    assert float(all_in_disorder) == pytest.approx(float(whole), rel=1e-5)
    assert abs(float(some) - float(whole)) > 1e-3


def test_grounding_equals_segmenting_scene_by_scene(flow_matching):
    pipeline = s4d.load(flow_matching / "export")
    scenes = [scene("validation", index, 32) for index in range(5)]
    latents = np.asarray(pipeline.encode_images([shown.image for shown in scenes], (32, 32)))
    items = [
        {"latents": latent, **grounding_item(shown, pipeline.tokenizers)}
        for latent, shown in zip(latents, scenes, strict=True)
    ]
    denoiser = Denoiser(pipeline.transformer, pipeline.encoders)
    sigma = pipeline.schedule.sigma_at(8)
    found = grounding(denoiser, InMemory(items), sigmas=[sigma], batch_size=3)
    noise = np.asarray(image_noise(0, range(5), latents.shape[1:]))
    for block in range(2):
        confusion = np.zeros((len(CLASSES), len(CLASSES)), int)
        names = [[CLASSES[index] for index in shown.classes] for shown in scenes]
        images = [shown.image for shown in scenes]
        for shown, masks in zip(scenes, pipeline.segment(images, names, block=block, noise=noise), strict=True):
            np.add.at(confusion, (shown.labels, np.array(shown.classes)[masks.labels]), 1)
        assert found[f"miou/{block}@{sigma:g}"] == pytest.approx(100 * mean_iou(confusion), abs=0.2)


@pytest.mark.parametrize("place", ["command line", "file"])
def test_an_unknown_option_is_refused(place, tmp_path, capsys):
    options = [*arguments("autoencoder", AUTOENCODER), f"--run.out={tmp_path / 'run'}"]
    if place == "command line":
        options.append("--optimizer.learning_rat=1")
    else:
        config = yaml.safe_load((CONFIGS / "autoencoder.yaml").read_text())
        config["optimizer"]["learning_rat"] = 1
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
        options[0] = f"--config={tmp_path / 'wrong.yaml'}"
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code != 0
    assert "learning_rat" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_task_that_does_not_exist_is_refused(capsys):
    assert main(["--task", "sewing"]) == 1
    assert "the task is 'sewing'; expected one of autoencoder, contrastive, flow_matching" in capsys.readouterr().err


def test_scenes_drawn_once_are_those_drawn_every_time(tmp_path):
    config = SceneConfig(size=32, train=70, cache=str(tmp_path / "scenes"))
    drawn, kept = SceneItems("train", 70, 32), training_scenes(config)
    for index in (0, 69):
        assert all(np.array_equal(kept[index][field], value) for field, value in drawn[index].items())
    with pytest.raises(ValueError, match="made of something else \\(count: 70, not 71\\)"):
        training_scenes(SceneConfig(size=32, train=71, cache=config.cache))
