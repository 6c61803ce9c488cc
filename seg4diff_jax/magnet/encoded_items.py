"""Training items whose pictures are encoded to latents, and prompts to text states, once for all epochs.

Neither changes while adapters are trained. The latents of a mirrored picture are not the mirrored latents. So both are
stored, and an item is mirrored by taking the other latents.

    latents   fp16 [1 or 2, rows, columns, channels]: of the picture as it is [, of the mirrored picture]
    states    fp16 [tokens, width] without the zeros that pad the context; pooled fp16 [width]
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from seg4diff_jax.data.loader import Batch, DataSource, Item, evaluation_batches
from seg4diff_jax.magnet.items import mirrored
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.encoders import Encoders, TokenIds, segments
from seg4diff_jax.parallel import on_host
from seg4diff_jax.passes import encode_images, encode_prompts

IDS = ("clip_l", "clip_g", "t5")


def encoded(encoders: Encoders, source: DataSource, batch_size: int, *, both: bool) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of a source's encoded items; `both`: with the latents of the mirrored pictures too."""
    for batch, count in evaluation_batches(source, batch_size):
        images = batch.pop("image")
        views = [images, images[:, :, ::-1]] if both else [images]
        latents = np.stack([on_host(encode_images(encoders.vae, view)).astype(np.float16) for view in views], axis=1)
        texts = _states(encoders, _ids(batch))
        states, pooled = (on_host(each).astype(np.float16) for each in texts)
        rest = {name: values for name, values in batch.items() if name != "index" and name not in IDS[1:]}
        whole = {**rest, "latents": latents, "states": states, "pooled": pooled}
        yield {name: values[:count] for name, values in whole.items()}


class Turned:
    """Mirrors half of the encoded items, at random in every epoch, if `flip`."""

    def __init__(self, flip: bool):
        self.flip = flip

    def __call__(self, item: Item, random: np.random.Generator) -> Item:
        turned = bool(self.flip and random.random() < 0.5)
        return {**(mirrored(item) if turned else item), "latents": item["latents"][int(turned)]}


def sum_of_weights(encoder: nnx.Module) -> float:
    """Sums the absolute values of 16 of an encoder's smaller parameters. Other weights give another sum."""
    leaves = [leaf for leaf in jax.tree.leaves(nnx.state(encoder)) if leaf.size <= 2**20][:16]
    return sum(float(np.abs(np.asarray(leaf, np.float64)).sum()) for leaf in leaves)


def hash_of_names(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def hash_of_files(root: Path, apart: Path) -> str:
    """Hashes the names and sizes of all files below `root`, except those below `apart`."""
    listing = hashlib.sha256()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if (Path(folder) / name).resolve() != apart.resolve())
        for file in sorted(files):
            path = Path(folder, file)
            listing.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
    return listing.hexdigest()


def conditioning(batch: Batch, joint_dim: int, clip_tokens: int) -> TextConditioning:
    """Returns context and pooled vectors of encoded items.

    Args:
      joint_dim: width of the context.
      clip_tokens: length of CLIP's prompts. Items with no more tokens than this have no T5 states; `clip_tokens` zero
        tokens take their place.
    """
    states = batch["states"].astype(jnp.float32)
    zeros = clip_tokens if states.shape[1] == clip_tokens else 0
    context = jnp.pad(states, ((0, 0), (0, min(zeros, 1)), (0, joint_dim - states.shape[-1])))
    parts = segments(clip_tokens, zeros or states.shape[1] - clip_tokens)
    return TextConditioning(context, batch["pooled"].astype(jnp.float32), max(1, zeros), parts)


def encoded_ids(encoders: Encoders, batch: Batch, joint_dim: int) -> TextConditioning:
    """Returns context and pooled vectors of items with token ids. Works under jit."""
    return encode_prompts(encoders, _ids(batch), joint_dim=joint_dim)


def _ids(batch: Batch) -> TokenIds:
    return TokenIds(**{name: jnp.asarray(batch[name], jnp.int32) for name in IDS if name in batch})


def _states(
    encoders: Encoders, ids: TokenIds
) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch pooled"]]:
    """Returns text states and pooled vectors. States are padded with zeros only to T5's width, if there is a T5."""
    if encoders.t5 is not None:
        texts = encode_prompts(encoders, ids, joint_dim=encoders.t5.config.d_model)
        return texts.context, texts.pooled
    width = encoders.clip_l.config.hidden_size + encoders.clip_g.config.hidden_size
    texts = encode_prompts(encoders, ids, joint_dim=width, t5_length=0)
    return texts.context, texts.pooled
