"""Checks that a checkpoint's components fit each other: a sound component may belong to another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from seg4diff_jax.convert.components import parse_config
from seg4diff_jax.convert.errors import CheckpointError, raise_all
from seg4diff_jax.convert.families import SD3

(CLIP_L, CLIP_G), T5 = SD3.clips, SD3.t5


def check_fit(configs: Mapping[str, dict[str, Any]], origins: Mapping[str, str]) -> None:
    """Raises CheckpointError unless the outputs of each component are as wide as the inputs that take them.

    The check compares the channels of pictures and latents, and the widths of the CLIPs' and T5's states.

    Args:
      configs: configurations by component.
      origins: for each component the place that it comes from, for messages.
    """
    parsed = {name: _parsed(name, config, origins[name]) for name, config in configs.items()}
    problems = [
        f"{origins[name]}: {problem}" for name, problem in (*_of_vae(parsed), *_of_transformer(parsed, origins))
    ]
    raise_all(problems, "components that do not fit each other")


def _parsed(name: str, config: dict[str, Any], origin: str) -> Any:
    try:
        return parse_config(name, config)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from None


def _of_vae(parsed: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    vae = parsed.get("vae")
    if vae is not None and (vae.in_channels, vae.out_channels) != (3, 3):
        yield "vae", f"the VAE takes pictures of {vae.in_channels} channels and gives {vae.out_channels}; expected 3"


def _of_transformer(parsed: Mapping[str, Any], origins: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    transformer = parsed.get("transformer")
    if transformer is None:
        return
    taken, given = transformer.in_channels, transformer.out_channels
    takes = f"the transformer of {origins['transformer']} takes"
    if taken != given:
        yield (
            "transformer",
            f"{takes} {taken} channels and gives {given}, as for inpainting; expected SD3 or SD3.5 itself",
        )
    elif "vae" in parsed and (latent := parsed["vae"].latent_channels) != taken:
        yield "vae", f"the VAE's latents have {latent} channels, {takes} {taken}"
    if {CLIP_L, CLIP_G} <= parsed.keys():
        clips, joint = (parsed[CLIP_L], parsed[CLIP_G]), transformer.joint_attention_dim
        if (pooled := sum(clip.projection_dim for clip in clips)) != transformer.pooled_projection_dim:
            yield (
                CLIP_G,
                f"the CLIPs' pooled states are {pooled} wide together, {takes} {transformer.pooled_projection_dim}",
            )
        if (states := sum(clip.hidden_size for clip in clips)) > joint:
            yield CLIP_G, f"the CLIPs' states are {states} wide together, {takes} at most {joint}"
    if T5 in parsed and (width := parsed[T5].d_model) != transformer.joint_attention_dim:
        yield T5, f"T5's states are {width} wide, {takes} {transformer.joint_attention_dim}"
