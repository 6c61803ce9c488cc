"""Masks that are fused and refined are those of explicit attention, view by view, in NumPy; and the evaluator's."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import seg4diff_jax as s4d
from seg4diff_jax import passes
from seg4diff_jax.evaluation.batches import Example, Reader, assemble
from seg4diff_jax.evaluation.benchmarks import folder_benchmark
from seg4diff_jax.evaluation.gallery import shown_by_name
from seg4diff_jax.evaluation.measurement import Measurement, Settings
from seg4diff_jax.evaluation.readouts import Forward, Readout
from seg4diff_jax.evaluation.rows import Setting
from seg4diff_jax.evaluation.vocabulary import questions
from seg4diff_jax.evaluation.zero_shot import Pass, ZeroShot
from seg4diff_jax.flow import image_noise
from seg4diff_jax.images import to_model_range
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions, joint_attention
from seg4diff_jax.models.concepts import attend_to_image_and_group, image_to_concepts
from seg4diff_jax.models.trunk import concepts_at
from seg4diff_jax.segmentation.class_prior import ClassPrior
from seg4diff_jax.segmentation.guided_filter import guide, guided
from seg4diff_jax.segmentation.mask_options import MaskOptions
from seg4diff_jax.segmentation.pamr import DILATIONS
from seg4diff_jax.segmentation.refinement import refined
from seg4diff_jax.text import class_prompts
from tests.reference import pamr
from tests.reference.inputs import NAMES, SIZE, SQUARE, VARIED, an_image
from tests.reference.random_weights import relative_error
from tests.reference.ties import SCORES, assert_same_labels
from tests.reference.varied_set import write_images

MASKS = MaskOptions(
    views=2, mirrored=True, levels=(5, 9), balance=0.3, rounds=2, sharpness=2.0, refine_block=1, refine_heads=(0, 2)
)
MANY_NAMES = [*NAMES, *(f"{first} {second}" for first in NAMES for second in NAMES if first != second)][:26]
"""Too many for one prompt."""
GRID = SIZE[0] // 16, SIZE[1] // 16


def stated(pipe: s4d.Pipeline, image: np.ndarray, names: list[str], masks: MaskOptions, seed: int) -> np.ndarray:
    """Class scores by whole matrices of attention: a pass for each view and prompt, one after the other."""
    prompts = class_prompts(pipe.tokenizers, names)
    averaging, tokens = prompts.averaging(), GRID[0] * GRID[1]
    latents = passes.encode_images(pipe.vae, to_model_range(image)[None])
    scores = np.zeros((len(names), tokens))
    mirror = lambda maps, view: maps.reshape(-1, *GRID)[..., ::-1].reshape(maps.shape) if view % 2 else maps
    for text, weights in zip(prompts.prompts, averaging, strict=True):
        maps, shared = [], []
        for view, level in enumerate(masks.levels):
            noise = image_noise(seed, [0], latents.shape[1:], view)
            seen = latents[:, :, ::-1] if view % 2 else latents
            noised = passes.NoisedImages(seen, noise, jnp.float32(pipe.schedule.sigma_at(level)))
            request = AttentionRequest(("image_to_text", "image_to_image"), qkv=True)
            records = passes.attention(
                pipe.transformer,
                noised,
                pipe.encode_prompts([text]),
                blocks=(1, VARIED),
                options=ForwardOptions(request),
            )
            probs = np.asarray(records[VARIED].probs, np.float64)[0].mean(axis=0)
            maps.append(mirror(weights @ probs.T, view))
            between = records[masks.refine_block].image_to_image
            sharpened = masks.sharpness * np.asarray(between.scores, np.float64)[0][list(masks.refine_heads)]
            attention = np.exp(sharpened - sharpened.max(axis=-1, keepdims=True))
            shared.append(attention / attention.sum(axis=-1, keepdims=True))
        fused = np.mean(maps, axis=0)
        named = fused.any(axis=1)
        fused[named] /= fused[named].mean(axis=1, keepdims=True) ** masks.balance
        for _ in range(masks.rounds):
            each = [mirror(mirror(fused, view) @ one.mean(axis=0).T, view) for view, one in enumerate(shared)]
            fused = np.mean(each, axis=0)
        scores += fused
    return scores.reshape(-1, *GRID)


@pytest.mark.parametrize("names", [NAMES, MANY_NAMES], ids=["one prompt", "several prompts"])
def test_masks_are_those_of_explicit_attention_view_by_view(sd3, names):
    image = an_image(*SIZE)
    found = sd3.segment(image, names, block=VARIED, seed=4, size=SIZE, masks=MASKS)
    assert len(found.prompts) == (1 if names is NAMES else 2)
    expected = stated(sd3, image, names, MASKS, seed=4)
    assert relative_error(found.scores, expected) <= SCORES
    assert relative_error(sd3.segment(image, names, block=VARIED, seed=4, size=SIZE).scores, expected) > 0.01


def test_the_first_view_alone_is_the_papers_mask(sd3):
    image = an_image(*SIZE)
    plain = sd3.segment(image, NAMES, block=VARIED, size=SIZE)
    one = sd3.segment(image, NAMES, block=VARIED, size=SIZE, masks=MaskOptions())
    np.testing.assert_array_equal(one.scores, plain.scores)
    np.testing.assert_array_equal(one.labels, plain.labels)


def test_labels_follow_the_edges_of_what_the_model_sees(sd3):
    """Scores come to the model's size, are filtered there, and then come to the image's own."""
    own, masks = (67, 90), MaskOptions(edge_radius=1.0, edge_smoothing=1e-2)
    image = an_image(*own)
    found = sd3.segment(image, NAMES, block=VARIED, size=SIZE, masks=masks)
    (group,) = sd3.view.by_size([image], SIZE, "aspect")
    by = guide(jnp.asarray(group.pixels[0] / 2 + 0.5), 16, 1e-2)
    at_size = np.stack([guided(jnp.asarray(each), by) for each in upsampled(found.scores, SIZE)])
    assert_same_labels(found.labels, upsampled(at_size, own).argmax(axis=0), at_size, error=1e-4, few=0.05)
    assert (found.labels != sd3.segment(image, NAMES, block=VARIED, size=SIZE).labels).mean() > 0.01


def test_labels_follow_colours_by_pamr_of_pytorch(sd3):
    own, image = (67, 90), an_image(67, 90)
    found = sd3.segment(image, NAMES, block=VARIED, size=SIZE, masks=MaskOptions(edge_rounds=3))
    (group,) = sd3.view.by_size([image], SIZE, "aspect")
    pixels = torch.from_numpy(group.pixels[0] / 2 + 0.5).permute(2, 0, 1)
    at_size = pamr.refined(pixels, torch.from_numpy(upsampled(found.scores, SIZE)), 3, DILATIONS).numpy()
    assert_same_labels(found.labels, upsampled(at_size, own).argmax(axis=0), at_size, error=1e-4, few=0.05)
    assert (found.labels != sd3.segment(image, NAMES, block=VARIED, size=SIZE).labels).mean() > 0.01


def upsampled(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return F.interpolate(torch.from_numpy(np.array(scores))[None], size, mode="bilinear")[0].numpy()


@pytest.mark.parametrize("reading", ["concepts", "concept outputs"])
def test_concepts_are_read_beside_an_empty_text_each_prompt_by_itself(sd3, reading):
    """Of images with lists of different lengths, in several prompts, two views of each; refined by an earlier block."""
    images, lists = [an_image(*SIZE), an_image(*SIZE, seed=1)], [MANY_NAMES, NAMES]
    masks = MaskOptions(reading=reading, views=2, levels=(5, 9))
    ask = partial(sd3.segment, block=VARIED, seed=4, size=SIZE)
    found = ask(images, lists, masks=masks)
    for place, (image, names) in enumerate(zip(images, lists, strict=True)):
        assert relative_error(found[place].scores, by_concepts(sd3, image, names, masks, place)) <= SCORES


@pytest.mark.parametrize("by", [1, 3])
def test_maps_of_concepts_are_refined_by_the_image_that_read_an_empty_text(sd3, by):
    image, masks = an_image(*SIZE), MaskOptions(reading="concepts", rounds=1, sharpness=2.0, refine_block=by)
    ask = partial(sd3.segment, image, NAMES, block=3, step=5, size=SIZE)
    maps = jnp.asarray(ask(masks=replace(masks, rounds=0, refine_block=None)).scores).reshape(1, len(NAMES), -1)
    latents = passes.encode_images(sd3.vae, to_model_range(image)[None])
    noise = image_noise(0, [0], latents.shape[1:])
    noised = passes.NoisedImages(latents, noise, jnp.float32(sd3.schedule.sigma_at(5)))
    options = ForwardOptions(AttentionRequest(qkv=True))
    record = passes.attention(sd3.transformer, noised, sd3.encode_prompts([""]), blocks=(by,), options=options)[by]
    q, k = (array[:, : maps.shape[-1]] for array in (record.q, record.k))
    expected = refined(maps, q, k, sharpness=2.0)
    assert relative_error(ask(masks=masks).scores, np.asarray(expected).reshape(-1, *GRID)) <= SCORES
    assert relative_error(maps, expected) > 0.01


def by_concepts(pipe: s4d.Pipeline, image: np.ndarray, names: list[str], masks: MaskOptions, place: int) -> np.ndarray:
    """Class scores, a pass for each view and prompt."""
    prompts = class_prompts(pipe.tokenizers, names)
    latents = passes.encode_images(pipe.vae, to_model_range(image)[None])
    scores = np.zeros((len(names), GRID[0] * GRID[1]))
    for text, weights in zip(prompts.prompts, prompts.averaging(), strict=True):
        for view, level in enumerate(masks.levels):
            noise = image_noise(4, [place], latents.shape[1:], view)
            noised = passes.NoisedImages(latents, noise, jnp.float32(pipe.schedule.sigma_at(level)))
            empty, concepts = pipe.encode_prompts([""]), pipe.encode_prompts([text])
            read = concepts_at(pipe.transformer, *noised.inputs(), empty, concepts, block=VARIED)
            image_qkv, text_qkv, own, _ = read
            if masks.reading == "concepts":
                probs = np.asarray(image_to_concepts(own, image_qkv, (0, weights.shape[1])), np.float64)[0].mean(axis=0)
                scores += weights @ probs.T / 2
            else:
                outputs = np.asarray(joint_attention(image_qkv, text_qkv)[0], np.float64).reshape(GRID[0] * GRID[1], -1)
                of_words = np.asarray(attend_to_image_and_group(own, image_qkv), np.float64)[0, : weights.shape[1]]
                scores += weights @ of_words.reshape(weights.shape[1], -1) @ outputs.T / 2
    return scores.reshape(-1, *GRID)


@pytest.mark.parametrize(
    "changed",
    [{"edge_radius": 1.0}, {"edge_rounds": 2}, {"edge_radius": 1.0, "reading": "concepts", "refine_block": None}],
    ids=["guided filter", "PAMR", "concepts"],
)
def test_the_evaluator_counts_the_masks_of_segment(sd3, tmp_path, changed):
    """Of a list of images, each with its number's noise, for the classes present and for all, in several prompts."""
    benchmark = folder_benchmark(write_images(tmp_path / "set", [(64, 64), (100, 70)]))
    masks = replace(MASKS, prior=0.5, **changed)
    prior = ClassPrior({name: 0.002 * place for place, name in enumerate(benchmark.classes, 1)}, VARIED, 8, 1)
    items = [each for each in Reader(benchmark, sd3.view).read(range(2)) if isinstance(each, Example)]
    forward = Forward(sd3, (Readout(VARIED, refined=True), Readout(VARIED)), masks)
    counting = ZeroShot(forward, len(benchmark.classes), steps=(8,), seeds=(5,), prompts=("present", "all"))
    asked = questions(benchmark, sd3.tokenizers, counting.prompts)
    batches = [assemble(items, 2, each, prior) for each in asked.values()]
    counting.add(forward.latents(batches[0].pixels), *batches)
    counted = counting.take()
    for place, (kind, each) in enumerate(asked.items()):
        lists = [[benchmark.classes[label] for label in each(item)[0]] for item in items]
        images = [benchmark.source[index]["image"] for index in range(2)]
        ask = partial(sd3.segment, images, lists, block=VARIED, step=8, seed=5, size=(SQUARE, SQUARE))
        scores = counting.scores(batches[place], Pass(8, 5, kind))
        for at, how in enumerate((None, masks)):  # the paper's masks come first
            found = ask(masks=how, prior=how and prior)
            for index, (item, one) in enumerate(zip(items, found, strict=True)):
                assert relative_error(scores[at, index, : len(one.classes)], one.scores) <= SCORES
                right = np.array(each(item)[0])[one.labels] == item.labels
                few = 1e-3 * right.size
                assert abs(int(right[item.labels != 255].sum()) - int(counted.right[place, at, index])) <= few


@pytest.mark.parametrize("kind", ["present", "all"])
def test_the_page_shows_the_papers_masks_beside_refined_ones(sd3, tmp_path, kind):
    benchmark = folder_benchmark(write_images(tmp_path / "set", [(64, 64), (100, 70)]))
    settings = Settings((VARIED,), (8,), (5,), batch_size=2, prompts=(kind,), masks=replace(MASKS, refine_block=None))
    measurement = Measurement(sd3, benchmark, settings)
    outcome = measurement.outcome()
    changed: list[float] = []
    for better in (False, True):
        best = Setting(step=8, block=VARIED, head=None, prompts=kind, refined=better)
        for shown in shown_by_name(measurement, outcome, best, 2):
            index, asked = shown.example.index, measurement.asked[kind](shown.example)
            names, size = [benchmark.classes[label] for label in asked[0]], (SQUARE, SQUARE)
            noise = np.asarray(image_noise(5, [index], (SQUARE // 8, SQUARE // 8, 16)))[0]
            plain = sd3.segment(shown.image, names, block=VARIED, step=8, noise=noise, size=size, resize="square")
            labels = np.array(asked[0])[plain.labels]
            assert ((shown.papers if better else shown.predicted) == labels).mean() > 0.99
            assert (shown.papers is None) == (not better)
            changed.append((shown.predicted != labels).mean())
    assert max(changed[:2]) < 0.01 < max(changed[2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "views is 0; expected 1 to 64"),
        ({"views": 3, "mirrored": True}, "mirrored takes every second view, and views is 3; expected an even number"),
        ({"levels": (29,)}, "levels has 29; expected noise levels of 1 (nearly clean) to 28 (pure noise)"),
        ({"levels": (3, 4)}, "2 levels for 1 views; expected a view for each level"),
        ({"normalize": "softmax"}, "normalize is 'softmax'; expected one of none, content, minmax"),
        ({"reading": "words"}, "reading is 'words'; expected one of prompt, concepts, concept outputs"),
        (
            {"reading": "concept outputs", "prior": 0.3},
            "concept outputs are no shares of attention: content, prior and",
        ),
        ({"balance": 1.5}, "balance is 1.5; expected 0 to 1"),
        ({"prior": -0.1}, "prior is -0.1; expected 0 to 1"),
        ({"prior": 0.5, "normalize": "minmax"}, "prior scales whole maps, which minmax undoes; expected one of them"),
        ({"rounds": -1}, "rounds is -1; expected 0 to 20"),
        ({"rounds": 1, "sharpness": float("nan")}, "sharpness is nan; expected a number above 0"),
        ({"rounds": 1, "refine_heads": ()}, "refine_heads is (); expected numbers of heads, each once, or None"),
        ({"refine_heads": (0,)}, "refine_block and refine_heads say how maps are refined; expected rounds of at"),
        ({"edge_radius": -1.0}, "edge_radius is -1.0; expected 0 or more, in image tokens"),
        ({"edge_rounds": -1}, "edge_rounds is -1; expected 0 to 100"),
        (
            {"edge_radius": 1.0, "edge_rounds": 10},
            "edge_radius and edge_rounds are two ways to the same edges",
        ),
        ({"edge_smoothing": 0.0}, "edge_smoothing is 0.0; expected a number above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=re.escape(message)):
        MaskOptions(**options)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"masks": MaskOptions(rounds=1, refine_block=6)}, "refine_block is 6; blocks 0..5 are loaded, and block 3"),
        ({"masks": MaskOptions(rounds=1, refine_heads=(1, 9))}, "refine_heads has 9; each block has heads 0.."),
        (
            {"masks": MaskOptions(reading="concepts", rounds=1, refine_block=4)},
            "refine_block is 4, and with concepts nothing after block 3 is run",
        ),
        ({"masks": {"rounds": 1}}, "masks is {'rounds': 1}; expected a MaskOptions"),
        ({"masks": MaskOptions(views=2), "noise": np.zeros((14, 18, 16), np.float32)}, "noise is given, and masks has"),
    ],
)
def test_what_does_not_fit_the_model_is_told_before_it_runs(sd3, how, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    monkeypatch.setattr(passes, "encode_images", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=re.escape(message)):
        sd3.segment(an_image(*SIZE), NAMES, block=3, size=SIZE, **how)
