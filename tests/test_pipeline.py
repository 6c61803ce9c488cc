"""Loading a checkpoint, what the pipeline remembers and compiles, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax import passes, prompt_cache
from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources import hub
from seg4diff_jax.flow import add_noise, image_noise
from seg4diff_jax.images import ImageError
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.models.sd3.model import MMDiT
from tests.reference.damage import with_damaged_autoencoder
from tests.reference.inputs import BLOCK, NAMES, SIZE, SQUARE, VARIED, a_noise, an_image
from tests.reference.random_weights import relative_error
from tests.reference.small_tokenizers import WORDS
from tests.reference.ties import SCORES, assert_same_labels

IMAGE = an_image(*SIZE)
LATENT = (SIZE[0] // 8, SIZE[1] // 8, 16)
COMPILATIONS: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _count_compilations():
    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            COMPILATIONS.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)


@pytest.fixture(scope="module")
def without_tokenizers(sd3_checkpoint, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bare") / "sd3"
    return shutil.copytree(sd3_checkpoint, directory, ignore=shutil.ignore_patterns("tokenizer*"))


@pytest.fixture(scope="module")
def first_four_blocks(without_tokenizers, sd3_checkpoint) -> s4d.Pipeline:
    return s4d.load(without_tokenizers, blocks=BLOCK + 1, tokenizers=sd3_checkpoint)


@pytest.fixture
def forgetful(sd3) -> s4d.Pipeline:
    """The small SD3 that has encoded nothing yet."""
    return dataclasses.replace(sd3, _conditioning=prompt_cache.PromptCache())


# ---- loading --------------------------------------------------------------------------------------------------------


def test_checkpoints_and_pipelines_say_in_a_line_what_they_are(sd3, sd3_checkpoint):
    assert repr(s4d.open(sd3_checkpoint)) == (
        f"Checkpoint({sd3_checkpoint}: transformer, vae, text_encoder, text_encoder_2)"
    )
    known = f"schedule={sd3.schedule}, expert_block=None, trained_size={sd3.trained_size}, expert_step=8, mesh=None"
    assert repr(sd3) == f"Pipeline({known})"


def test_a_converted_directory_gives_the_masks_of_the_original(forgetful, sd3_checkpoint, tmp_path):
    convert_checkpoint(sd3_checkpoint, tmp_path / "native")
    converted = s4d.load(tmp_path / "native")
    before = len(COMPILATIONS)
    expected = forgetful.segment(IMAGE, NAMES, block=VARIED)
    programs = len(COMPILATIONS) - before
    found = converted.segment(IMAGE, NAMES, block=VARIED)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert len(COMPILATIONS) - before == programs, "a model of the same configuration shares its programs"


def test_the_first_blocks_alone_give_the_same_masks_and_refuse_later_blocks(sd3, first_four_blocks):
    assert first_four_blocks.transformer.depth == BLOCK + 1
    found = first_four_blocks.segment(IMAGE, NAMES, block=BLOCK)
    expected = sd3.segment(IMAGE, NAMES, block=BLOCK)
    assert relative_error(found.scores, expected.scores) <= SCORES
    assert_same_labels(found.labels, expected.labels, expected.scores, few=0.02)
    with pytest.raises(ValueError, match=r"block is 4; the loaded transformer has blocks 0\.\.3"):
        first_four_blocks.segment(IMAGE, NAMES, block=BLOCK + 1)


def test_a_checkpoint_without_tokenizers_is_refused_when_the_published_ones_cannot_be_fetched(without_tokenizers):
    message = f"{without_tokenizers} comes without tokenizer, tokenizer_2: name a directory that holds these folders "
    with pytest.raises(CheckpointError, match=re.escape(message + "(tokenizers=DIR, --tokenizers DIR). Those publ")):
        s4d.load(without_tokenizers)  # tests are offline


def test_a_checkpoint_without_tokenizers_has_the_published_ones(
    forgetful, sd3_checkpoint, without_tokenizers, monkeypatch, tmp_path
):
    asked = []
    monkeypatch.setattr(hub, "fetch_tokenizers", lambda components: asked.append(components) or sd3_checkpoint)
    pipe = s4d.load(without_tokenizers, blocks=1)
    assert asked == [["transformer", "vae", "text_encoder", "text_encoder_2"]]
    expected = forgetful.encode_prompts(["a cat"]).context  # alone, too: of a batch the last bits may be others
    assert np.array_equal(pipe.encode_prompts(["a cat"]).context, expected)
    partly = shutil.copytree(sd3_checkpoint, tmp_path / "partly", ignore=shutil.ignore_patterns("tokenizer_2"))
    pipe = s4d.load(partly, blocks=1)  # one of its own, one published
    assert np.array_equal(pipe.encode_prompts(["a cat"]).context, expected)


def test_t5_that_is_not_there_is_refused(checkpoint_factory):
    checkpoint = checkpoint_factory(variant="sd3", t5=False)
    with pytest.raises(CheckpointError, match=re.escape(f"{checkpoint} has no text_encoder_3")):
        s4d.load(checkpoint, t5=True)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    absent = tmp_path / "absent"
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(absent))}: no such file or directory, and not a Hub id"
    ):
        s4d.load(absent)


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_the_checkpoints_expert_block_is_the_default(sd3):
    knowing = dataclasses.replace(sd3, expert_block=BLOCK)
    expected = sd3.segment(IMAGE, NAMES, block=BLOCK)
    np.testing.assert_array_equal(knowing.segment(IMAGE, NAMES).scores, expected.scores)
    with pytest.raises(
        ValueError, match="this checkpoint does not say which block segments best: name one with block="
    ):
        sd3.segment(IMAGE, NAMES)


def test_an_image_may_be_a_path_a_picture_or_an_array(sd3, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    expected = sd3.segment(IMAGE, NAMES, block=VARIED)
    for image in (tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(IMAGE)):
        np.testing.assert_array_equal(sd3.segment(image, NAMES, block=VARIED).scores, expected.scores)


def test_noise_is_drawn_by_seed_and_position(sd3):
    square = an_image(SQUARE, SQUARE)
    listed = sd3.segment([square, IMAGE], [NAMES, NAMES], block=VARIED, seed=7)[1]
    alone = sd3.segment(IMAGE, NAMES, block=VARIED, seed=7)
    for mask, position in ((alone, 0), (listed, 1)):
        noise = np.asarray(image_noise(7, [position], LATENT))
        np.testing.assert_array_equal(mask.scores, sd3.segment(IMAGE, NAMES, block=VARIED, noise=noise[0]).scores)
        np.testing.assert_array_equal(mask.scores, sd3.segment(IMAGE, NAMES, block=VARIED, noise=noise).scores)
    assert not np.array_equal(listed.scores, alone.scores)
    assert not np.array_equal(sd3.segment(IMAGE, NAMES, block=VARIED, seed=8).scores, alone.scores)


def test_no_images_have_no_masks(sd3):
    assert sd3.segment([], [], block=VARIED) == []


# ---- what is compiled and what is remembered ------------------------------------------------------------------------


def test_other_names_images_seeds_and_noise_levels_compile_nothing(forgetful):
    forgetful.segment(IMAGE, ["cat", "dog"], block=VARIED)
    before = len(COMPILATIONS)
    forgetful.segment(an_image(*SIZE, 1), ["sofa", "zebra crossing"], block=VARIED, seed=3)
    forgetful.segment(an_image(*SIZE, 2), ["sky", "giraffe", "tree", "wall", "a", "of"], block=VARIED, step=4)
    forgetful.segment(an_image(84, 108), ["bus"], block=VARIED)
    assert len(COMPILATIONS) == before
    forgetful.segment(IMAGE, WORDS[:9], block=VARIED)
    assert len(COMPILATIONS) > before


def test_a_prompt_is_encoded_once(forgetful, monkeypatch):
    encoded = []
    encode = passes.encode_prompts

    def counted(encoders, ids, *, joint_dim):
        encoded.append(len(ids.clip_l))
        return encode(encoders, ids, joint_dim=joint_dim)

    monkeypatch.setattr(passes, "encode_prompts", counted)
    first = forgetful.encode_prompts(["cat"])
    both = forgetful.encode_prompts(["dog", "cat", "dog"])
    assert encoded == [1, 1]
    alone = forgetful.encode_prompts("cat")
    assert encoded == [1, 1], "a string is one prompt, and not one for each letter"
    assert jax.tree.leaves(alone)[0].shape[0] == 1
    for found, expected in zip(jax.tree.leaves(both), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(found[1], expected[0])
        np.testing.assert_array_equal(found[0], found[2])
        assert not np.array_equal(found[0], found[1])
    forgetful.segment(IMAGE, ["cat"], block=VARIED)
    assert encoded == [1, 1]


def test_prompts_encoded_together_are_those_encoded_alone(sd3, forgetful):
    prompts = ["cat", "a dog on the grass", "sky"]
    together = forgetful.encode_prompts(prompts)
    for row, prompt in enumerate(prompts):
        alone = sd3.encode_prompts([prompt])
        for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert relative_error(np.asarray(found[row]), np.asarray(expected[0])) <= 1e-5


# ---- attention ------------------------------------------------------------------------------------------------------


def test_attention_is_the_models_own_record_of_every_block(sd3, first_four_blocks):
    noise, prompt = a_noise(*SIZE), " ".join(NAMES)
    records = sd3.attention(IMAGE, prompt, noise=noise)
    sigma = sd3.schedule.sigma_at(8)
    noisy = add_noise(sd3.encode_images([IMAGE], SIZE), jnp.asarray(noise[None]), sigma)
    run = jax.jit(lambda model, *inputs: model(*inputs, capture=range(6))[1])
    expected = run(sd3.transformer, noisy, jnp.array([1000 * sigma]), sd3.encode_prompts([prompt]))
    assert list(records) == list(expected) == list(range(6))
    for block, record in expected.items():
        assert record.probs.shape == (1, 4, 63, 77)
        assert relative_error(np.asarray(records[block].probs), np.asarray(record.probs)) <= 1e-5
        assert relative_error(np.asarray(records[block].scores), np.asarray(record.scores)) <= 1e-5
    cat = sd3.segment(IMAGE, NAMES, block=BLOCK, noise=noise).scores[0]
    assert relative_error(cat.ravel(), np.asarray(records[BLOCK].probs[0, :, :, 1].mean(0))) <= 1e-5
    for blocks in ((1, 3), 2):
        found = first_four_blocks.attention(IMAGE, prompt, blocks=blocks, noise=noise)
        assert list(found) == list(np.atleast_1d(blocks))
        for block, record in found.items():
            assert relative_error(np.asarray(record.probs), np.asarray(expected[block].probs)) <= 1e-5


def test_attention_is_by_default_of_as_many_tokens_as_a_prompt_of_this_tokenizer_has(first_four_blocks, monkeypatch):
    monkeypatch.setattr(first_four_blocks.tokenizers.clip_l, "model_max_length", 40)
    monkeypatch.setattr(first_four_blocks.tokenizers.clip_g, "model_max_length", 40)
    pipe = dataclasses.replace(first_four_blocks, _conditioning=prompt_cache.PromptCache())
    assert pipe.attention(IMAGE, "cat", blocks=1)[1].probs.shape == (1, 4, 63, 40)


def test_attention_of_all_blocks_of_a_part_of_a_model_is_one_pass(first_four_blocks, monkeypatch):
    embed, calls = MMDiT.embed, []
    monkeypatch.setattr(MMDiT, "embed", lambda self, *inputs: calls.append(0) or embed(self, *inputs))
    assert list(first_four_blocks.attention(IMAGE, "cat", request=AttentionRequest(scores=False))) == [0, 1, 2, 3]
    assert len(calls) == 1


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 6}, r"block is 6; the loaded transformer has blocks 0\.\.5"),
        ({"block": -1}, r"block is -1; the loaded transformer has blocks 0\.\.5"),
        ({"step": 0}, r"step is 0; expected a whole number, 1 \(nearly clean\) to 28"),
        ({"step": 29}, r"step is 29; expected a whole number, 1 \(nearly clean\) to 28"),
        ({"size": (100, 128)}, "size is 100 x 128; sides must be multiples of 16, up to 384"),
        ({"size": (128, 400)}, "size is 128 x 400; sides must be multiples of 16, up to 384"),
        ({"size": (0, 128)}, "size is 0 x 128; sides must be multiples of 16"),
        ({"size": (-16, 128)}, "size is -16 x 128; sides must be multiples of 16"),
        ({"noise": np.zeros((18, 14, 16), np.float32)}, r"noise is \[18, 14, 16\]; expected \[14, 18, 16\]"),
        ({"noise": np.zeros((14, 18, 4), np.float32)}, r"noise is \[14, 18, 4\]; expected \[14, 18, 16\]"),
        ({"noise": np.zeros((2, *LATENT), np.float32)}, r"noise is \[2, 14, 18, 16\]; .* or \[1, 14, 18, 16\]"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(sd3, options, message):
    with pytest.raises(ValueError, match=message):
        sd3.segment(IMAGE, NAMES, **({"block": VARIED} | options))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "the list of class names is empty"),
        (["cat", ""], r"class name 1 is blank \(''\)"),
        (["cat", "dog", "cat"], "class name 'cat' is repeated"),
        (["Cat", "cat"], "class name 'cat' is repeated: to the text encoder it is 'Cat'"),
        ([" ".join(WORDS + WORDS)], "a prompt room for 75; shorten it"),
    ],
)
def test_class_names_that_have_no_place_of_their_own_are_refused(sd3, names, message):
    with pytest.raises(ValueError, match=message):
        sd3.segment(IMAGE, names, block=VARIED)


def test_images_and_lists_of_names_must_be_as_many(sd3):
    with pytest.raises(ValueError, match="2 images and 1 lists of class names; expected one for each"):
        sd3.segment([IMAGE, IMAGE], [NAMES], block=VARIED)
    with pytest.raises(ValueError, match="2 images and 3 prompts; expected one for all, or one for each"):
        sd3.attention([IMAGE, IMAGE], ["a", "b", "c"], blocks=VARIED)


def test_one_list_of_names_is_for_all_images(sd3):
    images = [IMAGE, an_image(84, 108)]
    for found, expected in zip(
        sd3.segment(images, NAMES, block=VARIED), sd3.segment(images, [NAMES, NAMES], block=VARIED), strict=True
    ):
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_of_several_seeds_scores_are_the_mean(sd3):
    each = [sd3.segment(IMAGE, NAMES, block=VARIED, seed=seed).scores for seed in (3, 0, 7)]
    found = sd3.segment(IMAGE, NAMES, block=VARIED, seed=(3, 0, 7))
    assert np.abs(each[0] - each[1]).max() > 1e-4
    np.testing.assert_allclose(found.scores, np.mean(each, axis=0), rtol=1e-5)
    assert found.labels.shape == IMAGE.shape[:2]


@pytest.mark.parametrize("seed", [(), (1, 1)])
def test_seeds_that_make_no_mean_are_refused(sd3, seed):
    with pytest.raises(ValueError, match="expected a whole number, or several, each once"):
        sd3.segment(IMAGE, NAMES, block=VARIED, seed=seed)
    with pytest.raises(ValueError, match="noise is given, of which no seed makes others"):
        sd3.segment(IMAGE, NAMES, block=VARIED, seed=(0, 1), noise=a_noise(*SIZE), size=SIZE)


def test_attention_of_a_list_of_images_is_that_of_each(sd3):
    images, prompts = [IMAGE, an_image(84, 108), IMAGE], ["cat", "a dog", "sky"]
    sizes = [sd3.view.size(image.shape[:2], None, "aspect") for image in images]
    noises = [np.asarray(sd3.view.noise(None, [place], 3, size, 5)) for place, size in enumerate(sizes)]
    found = sd3.attention(images, prompts, blocks=(1, VARIED), seed=5)
    for image, prompt, noise, records in zip(images, prompts, noises, found, strict=True):
        alone = sd3.attention(image, prompt, blocks=(1, VARIED), noise=noise[0])
        assert records.keys() == alone.keys()
        for block in records:
            assert records[block].probs.shape == alone[block].probs.shape
            assert relative_error(np.asarray(records[block].probs), np.asarray(alone[block].probs)) <= 1e-5


def test_noise_that_is_not_finite_is_refused_as_such(sd3):
    noise = np.zeros((SIZE[0] // 8, SIZE[1] // 8, 16), np.float32)
    noise[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="noise has values that are not finite"):
        sd3.segment(an_image(*SIZE), NAMES, block=BLOCK, size=SIZE, noise=noise)


def test_noise_for_another_number_of_images_is_refused(sd3):
    noise = np.zeros((1, *LATENT), np.float32)
    with pytest.raises(ValueError, match=r"noise is \[1, 14, 18, 16\]; expected \[14, 18, 16\] or \[2, 14, 18, 16\]"):
        sd3.segment([IMAGE, IMAGE], [NAMES, NAMES], block=VARIED, noise=noise)


def test_an_unreadable_image_of_a_list_is_named(sd3, tmp_path):
    with pytest.raises(ImageError, match=rf"{re.escape(str(tmp_path / 'absent.png'))}: no such file"):
        sd3.segment([IMAGE, tmp_path / "absent.png"], [NAMES, NAMES], block=VARIED)


def test_attention_of_a_block_that_is_not_there_is_refused(sd3):
    for blocks in (6, (6,), (0, 6)):
        with pytest.raises(ValueError, match=r"block is 6; the loaded transformer has blocks 0\.\.5"):
            sd3.attention(IMAGE, "cat", blocks=blocks)
    with pytest.raises(ValueError, match="no block is named"):
        sd3.attention(IMAGE, "cat", blocks=())


# ---- what is of no use is refused, with the way out ------------------------------------------------------------------


def test_a_copy_without_t5_loads_though_its_index_names_it(sd3_checkpoint, tmp_path):
    copy = shutil.copytree(sd3_checkpoint, tmp_path / "sd3", ignore=shutil.ignore_patterns("text_encoder_3"))
    assert s4d.load(copy, blocks=1).encoders.t5 is None
    with pytest.raises(CheckpointError, match="text_encoder_3, which it has no folder for"):
        s4d.load(copy, blocks=1, t5=True)


def test_text_encoders_come_from_elsewhere_when_a_checkpoint_has_none(sd3, sd3_checkpoint, tmp_path):
    bare = tmp_path / "bare"
    convert_checkpoint(sd3_checkpoint, bare, components=["transformer", "vae"])
    with pytest.raises(CheckpointError, match="text_encoders="):
        s4d.load(bare)
    pipe = s4d.load(bare, blocks=BLOCK + 1, text_encoders=sd3_checkpoint)
    expected = sd3.segment(IMAGE, NAMES, block=BLOCK, size=SIZE)
    np.testing.assert_array_equal(pipe.segment(IMAGE, NAMES, block=BLOCK, size=SIZE).labels, expected.labels)


@pytest.mark.parametrize("dtype", ["float16", "int8", "flaot32"])
def test_a_dtype_that_the_models_do_not_compute_in_is_refused(sd3_checkpoint, dtype):
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'; expected float32 or bfloat16"):
        s4d.load(sd3_checkpoint, dtype=dtype)


def test_a_mesh_with_other_axes_is_refused(sd3_checkpoint):
    with pytest.raises(ValueError, match="make_mesh"):
        s4d.load(sd3_checkpoint, mesh=jax.make_mesh((1,), ("batch",)))
    explicit = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 3)
    with pytest.raises(ValueError, match="not left to the compiler"):
        s4d.load(sd3_checkpoint, mesh=explicit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "squash"}, "resize is 'squash'; expected one of aspect, square, release"),
        ({"size": 128}, r"size is 128; expected \(height, width\)"),
        ({"size": ()}, r"size is \(\); expected \(height, width\)"),
        ({"size": (64.0, 96)}, r"size is \(64.0, 96\); expected \(height, width\) in whole pixels"),
        ({"size": (64, 90)}, "size is 64 x 90; sides must be multiples of 16, up to"),
        ({"size": (0, 64)}, "size is 0 x 64; sides must be multiples of 16"),
        ({"seed": 2**32}, "seed is 4294967296; expected a whole number, 0 to 4294967295"),
        ({"seed": 0.5}, "seed is 0.5; expected a whole number"),
        ({"step": 8.5}, "step is 8.5; expected a whole number"),
        ({"step": True}, "step is True; expected a whole number"),
        ({"block": "3"}, "block is '3'; the loaded transformer has blocks"),
        ({"block": True}, "block is True; the loaded transformer has blocks"),
    ],
)
def test_options_that_mean_nothing_are_refused(sd3, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: types are checked in tests only
    with pytest.raises(ValueError, match=message):
        sd3.segment(IMAGE, NAMES, **{"block": BLOCK} | options)


def test_scores_that_are_not_finite_are_no_masks(sd3):
    with pytest.raises(FloatingPointError, match="not finite"):
        with_damaged_autoencoder(sd3).segment(IMAGE, NAMES, block=BLOCK, size=SIZE)


def test_prompts_remembered_are_bounded(forgetful, monkeypatch):
    monkeypatch.setattr(prompt_cache, "REMEMBERED", 3)
    first = forgetful.encode_prompts(["a", "b", "c", "d"])
    assert list(forgetful._conditioning.kept) == ["b", "c", "d"]
    forgetful.encode_prompts(["b", "e"])
    assert list(forgetful._conditioning.kept) == ["d", "b", "e"]  # "c" was used least recently
    again = forgetful.encode_prompts(["a", "b", "c", "d"])
    np.testing.assert_allclose(first.context, again.context, atol=1e-5)
    with pytest.raises(ValueError, match="at least one prompt"):
        forgetful.encode_prompts([])


def test_float32_is_multiplied_as_float32_on_accelerators(sd3):
    with sd3.settings():
        assert jax.config.jax_default_matmul_precision == "highest"
