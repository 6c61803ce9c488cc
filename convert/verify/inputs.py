"""The inputs that both frameworks are given: a drawn picture, a prompt, and seeded noise."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.families import SD3
from seg4diff_jax.convert.readers import Source
from seg4diff_jax.convert.tokenizers import open_tokenizers
from seg4diff_jax.text import class_prompts, tokenize

CLASSES = ("cat", "grass", "sky")
CLIPS, T5 = SD3.clips, SD3.t5
TOKENS = 77
"""Length of a prompt if no CLIP says another."""
STEPS = 28
"""Steps of the schedule. Masks are read at the checkpoint's own step, counted from the clean end, or the paper's, 8."""

EXPERT_ROW = "expert block: image-to-text probs"
SCORES_ROW = "class scores"
"""Rows that masks are made of. They are computed as in the pipeline: the mean over heads, and nothing after q and k."""


class Conditioning(NamedTuple):
    """The text encoders' results that the transformer takes, fp32."""

    context: Float[np.ndarray, "1 tokens width"]
    pooled: Float[np.ndarray, "1 pooled"]


class Sample(NamedTuple):
    """The inputs of the transformer, fp32."""

    latents: Float[np.ndarray, "1 rows columns channels"]
    timestep: float
    conditioning: Conditioning


@dataclass(frozen=True)
class Prompt:
    """Token ids of each text encoder, and the weights that average each class's tokens.

    T5's prompt is as long as the CLIPs'. `described` says in words what the ids are.
    """

    ids: Mapping[str, Int[np.ndarray, "1 tokens"]]
    averaging: Float[np.ndarray, "1 classes tokens"]
    described: str

    @property
    def tokens(self) -> int:
        """Length of every encoder's prompt, in tokens."""
        return self.averaging.shape[-1]


@dataclass(frozen=True)
class TransformerInputs:
    """Noise, and seeded numbers in place of the outputs of an absent VAE or of absent text encoders.

    `block` is the block whose maps become masks, and `step` the noise level at which they are read. The last
    `last_token_count` tokens of the context are equal: zeros for an absent T5, of which the pipeline computes one.
    """

    noise: Float[np.ndarray, "1 rows columns channels"]
    latents: Float[np.ndarray, "1 rows columns channels"]
    conditioning: Conditioning
    block: int
    step: int
    last_token_count: int


@dataclass(frozen=True)
class Inputs:
    """The inputs of every component. `size` is the picture's side in pixels, `joint_dim` the context's width."""

    size: int
    picture: Float[np.ndarray, "1 size size 3"]
    prompt: Prompt
    joint_dim: int
    transformer: TransformerInputs | None


def make_inputs(source: Source, size: int) -> Inputs:
    """Makes the inputs of every component that a checkpoint has.

    Raises CheckpointError when tokenizers are damaged or the checkpoint takes no pictures of that size.
    """
    _check_size(source, size)
    transformer, prompt = None, make_prompt(source)
    if "transformer" in source.configs:
        config = source.parsed["transformer"]
        side, expert = size // _pixels_per_latent(source), source.expert_block
        shape = (1, side, side, config.in_channels)
        context = _draw("context", (1, 2 * prompt.tokens, config.joint_attention_dim))
        conditioning = Conditioning(context, _draw("pooled", (1, config.pooled_projection_dim)))
        block = config.num_layers // 2 if expert is None else expert
        zeros = source.configs.keys() >= set(CLIPS) and T5 not in source.configs
        transformer = TransformerInputs(
            _draw("noise", shape),
            _draw("latents", shape),
            conditioning,
            block,
            source.expert_step,
            prompt.tokens if zeros else 1,
        )
    return Inputs(size, draw_picture(size), prompt, _joint_dim(source), transformer)


def _joint_dim(source: Source) -> int:
    """Returns the context's width: the transformer's, or else T5's, or else what the CLIPs need."""
    parsed = source.parsed
    clips = sum(parsed[name].hidden_size for name in CLIPS if name in parsed)
    if "transformer" in parsed:
        width = parsed["transformer"].joint_attention_dim
    else:
        width = parsed[T5].d_model if T5 in parsed else clips
    if clips > width:
        raise CheckpointError(f"{source.origin}: the CLIPs' states are {clips} wide, the context only {width}")
    return width


def _draw(what: str, shape: tuple[int, ...]) -> Float[np.ndarray, "*shape"]:
    """Returns standard normal numbers. The seed depends on the name `what` alone."""
    return np.random.default_rng(zlib.crc32(what.encode())).standard_normal(shape).astype(np.float32)


def draw_picture(size: int) -> Float[np.ndarray, "1 size size 3"]:
    """Draws a grey disc with two ears on a rough meadow below a graded sky, in [-1, 1]."""
    rows, columns = np.mgrid[0:size, 0:size] / size
    sky = np.stack([0.4 + 0.4 * rows, 0.6 + 0.3 * rows, np.full_like(rows, 0.95)], axis=-1)
    blades = np.random.default_rng(0).uniform(0.6, 1.0, (size, size, 1))
    horizon = 0.6 + 0.05 * np.sin(6 * columns)
    picture = np.where((rows > horizon)[..., None], blades * [0.2, 0.6, 0.15], sky)
    for row, column, radius in ((0.62, 0.45, 0.18), (0.44, 0.36, 0.06), (0.44, 0.54, 0.06)):
        inside = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        picture[inside] = 0.35 + 0.2 * np.sin(40 * columns[inside])[:, None]
    return (2 * picture - 1).astype(np.float32)[None]


def make_prompt(source: Source) -> Prompt:
    """Returns the class names in the checkpoint's own tokens, or seeded random ids without tokenizers for both CLIPs.

    Raises CheckpointError when tokenizers are damaged.
    """
    encoders = [name for name in (*CLIPS, T5) if name in source.configs]
    parsed = {name: source.parsed[name] for name in encoders}

    def random_ids(tokens: int) -> dict[str, Int[np.ndarray, "1 tokens"]]:
        rng = np.random.default_rng(0)
        return {name: rng.integers(0, each.vocab_size, (1, tokens), dtype=np.int32) for name, each in parsed.items()}

    if not {"tokenizer", "tokenizer_2"} <= source.tokenizers.keys():
        tokens = min((parsed[name].max_position_embeddings for name in CLIPS if name in parsed), default=TOKENS)
        averaging = np.eye(tokens, dtype=np.float32)[None, 1 : 1 + len(CLASSES)]
        described = "seeded random token ids (no tokenizers)" if encoders else "seeded random context (no text encoder)"
        return Prompt(random_ids(tokens), averaging, described)
    t5 = T5 in encoders and "tokenizer_3" in source.tokenizers
    tokenizers = open_tokenizers(source, t5=t5)
    try:
        prompts = class_prompts(tokenizers, CLASSES)
    except ValueError as error:
        raise CheckpointError(f"{source.origin}: {error}") from None
    if len(prompts.prompts) != 1:
        raise CheckpointError(
            f"{source.origin}: its CLIP prompts have {prompts.length} tokens, too few for {', '.join(CLASSES)} in one"
        )
    found = tokenize(tokenizers, prompts.prompts, t5_length=prompts.length)
    ids = random_ids(prompts.length) | {
        "text_encoder": np.asarray(found.clip_l),
        "text_encoder_2": np.asarray(found.clip_g),
    }
    if found.t5 is not None:
        ids[T5] = np.asarray(found.t5)
    return Prompt(ids, prompts.averaging(), f"prompt {prompts.prompts[0]!r}")


def usual_size(source: Source) -> int:
    """Returns the side of the test picture if none is asked for: 256, or the most that the checkpoint takes."""
    _, most = _sizes(source)
    return 256 if most is None else min(256, most)


def _sizes(source: Source) -> tuple[int, int | None]:
    """What sides are multiples of, and the largest; None: there is no transformer that limits them."""
    multiple = _pixels_per_latent(source)
    if "transformer" not in source.configs:
        return multiple, None
    config = source.parsed["transformer"]
    return multiple * config.patch_size, multiple * config.patch_size * config.pos_embed_max_size


def _check_size(source: Source, size: int) -> None:
    multiple, most = _sizes(source)
    if size <= 0 or size % multiple or (most is not None and size > most):
        limit = "" if most is None else f", up to {most}"
        raise CheckpointError(f"--size {size}: this checkpoint takes multiples of {multiple}{limit}")


def _pixels_per_latent(source: Source) -> int:
    return source.parsed["vae"].downsampling if "vae" in source.configs else 8
