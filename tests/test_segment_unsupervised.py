"""Masks without names from an image: the attention is PyTorch's, the rest that of plain loops."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.flow import image_noise
from seg4diff_jax.images import ImageError
from seg4diff_jax.segmentation.unsupervised import MERGE_THRESHOLDS
from tests.reference import diffcut, diffseg
from tests.reference import unsupervised as reference
from tests.reference.damage import with_damaged_autoencoder
from tests.reference.inputs import BLOCK, SIZE, VARIED, a_noise, an_image
from tests.reference.processes import flags
from tests.reference.random_weights import relative_error
from tests.reference.release import Release, as_they_are
from tests.reference.ties import assert_same_labels
from tests.reference.unsupervised import thresholds_between

IMAGE, NOISE = an_image(*SIZE), a_noise(*SIZE)
GRID = (SIZE[0] // 16, SIZE[1] // 16)


@pytest.fixture(scope="module")
def columns(sd3_checkpoint) -> np.ndarray:
    """PyTorch's image-to-text attention under an empty prompt, [image, 77]."""
    release = Release(sd3_checkpoint)
    noisy, timestep = release._noisy_latents(as_they_are(IMAGE), NOISE, 8)
    return release._image_to_text(noisy, timestep, "", VARIED).detach().numpy()


@pytest.mark.parametrize("minmax", ["pixel", "token"])
def test_segments_are_those_of_pytorchs_attention_and_plain_loops(sd3, columns, minmax):
    counts = []
    for threshold in thresholds_between(columns, minmax, 3):
        ours = sd3.segment_unsupervised(IMAGE, block=VARIED, noise=NOISE, size=SIZE, threshold=threshold, minmax=minmax)
        expected = reference.merged(columns, threshold, minmax)
        assert ours.segments == len(expected)
        assert relative_error(ours.maps.reshape(ours.segments, -1), expected) <= 1e-5
        assert_same_labels(ours.labels, reference.labels_of(ours.maps, GRID, SIZE), ours.maps, error=0)
        assert ours.labels.dtype == np.int32
        assert ours.maps.shape == (ours.segments, *GRID)
        counts.append(ours.segments)
    assert max(counts) > 5
    assert min(counts) == 1


def vectors(pipe: s4d.Pipeline, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys of the image tokens, [tokens, heads, head_dim]."""
    noise, tokens = np.asarray(image_noise(seed, [0], (2 * GRID[0], 2 * GRID[1], 16)))[0], GRID[0] * GRID[1]
    request = s4d.AttentionRequest(scores=False, qkv=True)
    record = pipe.attention(IMAGE, "", blocks=VARIED, noise=noise, size=SIZE, request=request)[VARIED]
    return tuple(np.asarray(each)[0, :tokens].astype(float) for each in (record.q, record.k))


@pytest.mark.parametrize("seeds", [(5,), (5, 6)], ids=["one seed", "two seeds"])
def test_diffseg_merges_maps_of_whole_attention_over_seeds_and_heads(sd3, seeds):
    maps = np.mean([diffseg.attention(*vectors(sd3, seed)) for seed in seeds], axis=0)
    apart = np.sort([reference.symmetric_kl(x, y) for at, x in enumerate(maps) for y in maps[:at]])
    for threshold in apart[len(apart) // 400 :] * 1.0001:
        expected, nearest = diffseg.merged(maps, [*range(len(maps))], threshold, rounds=3)
        if nearest > 3e-5 and len(expected) < len(maps) // 2:
            break
    how = {"grouping": "diffseg", "threshold": float(threshold)}
    ours = sd3.segment_unsupervised(IMAGE, block=VARIED, seed=seeds, size=SIZE, **how)
    assert ours.segments == len(expected) > 1
    assert relative_error(ours.maps.reshape(ours.segments, -1), expected) <= 1e-5
    assert_same_labels(ours.labels, reference.labels_of(ours.maps, GRID, SIZE), ours.maps, error=0)


@pytest.mark.parametrize("seeds", [(5,), (5, 6)], ids=["one seed", "two seeds"])
def test_diffcut_cuts_where_the_keys_of_all_seeds_and_heads_differ(sd3, seeds):
    keys = np.concatenate([vectors(sd3, seed)[1].reshape(GRID[0] * GRID[1], -1) for seed in seeds], axis=1)
    weights = diffcut.affinity(keys, 10)
    threshold = diffcut.best_cut(weights)[1] + 0.02
    expected = sorted(diffcut.parts(weights, np.arange(len(keys)), threshold))
    how = {"grouping": "diffcut", "threshold": threshold}
    ours = sd3.segment_unsupervised(IMAGE, block=VARIED, seed=seeds, size=SIZE, **how)
    assert ours.segments == len(expected) > 1
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    means = np.stack([unit[part].mean(axis=0) for part in expected])
    assert relative_error(ours.maps.reshape(ours.segments, -1), means @ unit.T) <= 1e-5
    assert_same_labels(ours.labels, reference.labels_of(ours.maps, GRID, SIZE), ours.maps, error=0)


def test_the_default_threshold_is_that_of_the_normalisation(sd3):
    knowing = dataclasses.replace(sd3, expert_block=VARIED)
    for minmax, threshold in MERGE_THRESHOLDS.items():
        ours = knowing.segment_unsupervised(IMAGE, minmax=minmax)
        expected = sd3.segment_unsupervised(IMAGE, minmax=minmax, threshold=threshold, block=VARIED, step=8)
        np.testing.assert_array_equal(ours.maps, expected.maps)
        np.testing.assert_array_equal(ours.labels, expected.labels)


def test_a_list_of_images_of_many_sizes_has_the_segments_of_each_alone(sd3):
    images = [IMAGE, an_image(150, 100, 2), an_image(84, 108, 3)]
    unmerged = sd3.segment_unsupervised(images, block=VARIED, seed=5, threshold=1e-30)
    threshold = reference.threshold_near(0.02, *([*one.maps.reshape(one.segments, -1)] for one in unmerged))
    together = sd3.segment_unsupervised(images, block=VARIED, seed=5, threshold=threshold)
    assert [one.labels.shape for one in together] == [image.shape[:2] for image in images]
    for place, (image, ours) in enumerate(zip(images, together, strict=True)):
        rows, columns = ours.maps.shape[1:]
        noise = np.asarray(image_noise(5, [place], (2 * rows, 2 * columns, 16)))[0]
        alone = sd3.segment_unsupervised(image, block=VARIED, noise=noise, threshold=threshold)
        assert ours.segments == alone.segments
        assert relative_error(ours.maps, alone.maps) <= 1e-5
        assert_same_labels(ours.labels, alone.labels, alone.maps)
    assert sd3.segment_unsupervised([], block=VARIED) == []


def test_an_image_may_be_a_path_a_picture_or_an_array(sd3, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    expected = sd3.segment_unsupervised(IMAGE, block=VARIED)
    for image in (tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(IMAGE)):
        np.testing.assert_array_equal(sd3.segment_unsupervised(image, block=VARIED).labels, expected.labels)


def test_another_threshold_image_seed_or_number_of_segments_compiles_nothing(sd3):
    compilations, counts = [], []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    for number, threshold in enumerate((1.0, 1e-9, 0.01, 0.02)):
        found = sd3.segment_unsupervised(an_image(*SIZE, number), block=VARIED, threshold=threshold, seed=number)
        counts.append(found.segments)
        if number == 0:
            compilations.clear()
    assert len(set(counts)) > 2
    assert not compilations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold is 0; expected a number above 0"),
        ({"threshold": "0.1"}, "threshold is '0.1'; expected a number above 0"),
        ({"minmax": "row"}, "minmax is 'row'; expected one of pixel, token"),
        ({"grouping": "kmeans"}, "grouping is 'kmeans'; expected one of pads, diffseg, diffcut"),
        ({"block": 6}, "block is 6; the loaded transformer has blocks"),
        ({"step": 29}, "step is 29"),
        ({"seed": -1}, "seed is -1"),
        ({"size": (64, 90)}, "size is 64 x 90; sides must be multiples of 16"),
        ({"noise": np.zeros((2, 2, 16), np.float32)}, r"noise is \[2, 2, 16\]"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(sd3, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: types are checked in tests only
    with pytest.raises(ValueError, match=message):
        sd3.segment_unsupervised(IMAGE, **{"block": VARIED} | options)


def test_what_cannot_be_segmented_is_told(sd3, tmp_path):
    with pytest.raises(ValueError, match="does not say which block segments best"):
        sd3.segment_unsupervised(IMAGE)
    with pytest.raises(ImageError, match=r"absent\.png: no such file"):
        sd3.segment_unsupervised(tmp_path / "absent.png", block=VARIED)
    with pytest.raises(FloatingPointError, match="not finite"):
        with_damaged_autoencoder(sd3).segment_unsupervised(IMAGE, block=BLOCK, size=SIZE)
    for grouping in ("diffseg", "diffcut"):
        with pytest.raises(FloatingPointError, match="not finite"):
            with_damaged_autoencoder(sd3).segment_unsupervised(IMAGE, block=BLOCK, size=SIZE, grouping=grouping)


ON_EIGHT_DEVICES = f"""
import sys
import numpy as np
import seg4diff_jax as s4d
from seg4diff_jax.parallel import make_mesh

checkpoint, images, target = sys.argv[1:4]
pipe = s4d.load(checkpoint, mesh=make_mesh(data=2, fsdp=2, tensor=2), blocks={VARIED + 1})
options = dict(block={VARIED}, size={SIZE}, seed=5, threshold=float(sys.argv[4]))
found = pipe.segment_unsupervised(list(np.load(images)), **options)
np.savez(target, **{{str(number): one.maps for number, one in enumerate(found)}})
"""


def test_a_mesh_of_eight_devices_finds_the_segments_of_one(sd3, sd3_checkpoint, tmp_path):
    images = np.stack([an_image(*SIZE, seed) for seed in range(4)])
    np.save(tmp_path / "images.npy", images)
    sooner = flags("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")  # to compile
    environment = os.environ | sooner | {"PYTHONPATH": str(Path(__file__).parents[1])}
    unmerged = sd3.segment_unsupervised(list(images), block=VARIED, size=SIZE, seed=5, threshold=1e-30)
    threshold = reference.threshold_near(0.02, *([*one.maps.reshape(one.segments, -1)] for one in unmerged))
    arguments = [str(sd3_checkpoint), str(tmp_path / "images.npy"), str(tmp_path / "maps.npz"), str(threshold)]
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    expected = sd3.segment_unsupervised(list(images), block=VARIED, size=SIZE, seed=5, threshold=threshold)
    with np.load(tmp_path / "maps.npz") as spread:
        for number, one in enumerate(expected):
            assert relative_error(spread[str(number)], one.maps) <= 1e-5


def test_the_result_can_be_imported_from_the_package():
    assert s4d.UnsupervisedSegmentation.__name__ in s4d.__all__
