"""Principal components of every block's queries, keys and values of the image, computed inside the pass.

As colours, the first three show what a block tells apart: positions, parts or objects (Seg4Diff, figures 3 and 29).
A pass of SD3 has 72 decompositions, each of about 1024 x 1536 numbers, of which three components are wanted. So neither
a matrix of tokens by tokens nor one of dim by dim is made: a few directions more than are wanted are multiplied by the
features and their transpose until the leading ones stay (block subspace iteration with Rayleigh-Ritz).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seg4diff_jax.models.attention import ForwardOptions, JointQKV, Stream
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.trunk import attentions_at
from seg4diff_jax.passes import NoisedImages

OVERSAMPLING = 13
"""Directions beside those that are wanted. The more there are, the fewer iterations are needed."""
TOLERANCE = 1e-5
"""Largest change, in one iteration, of a singular value (relative to the first) or of a direction (its length is 1)."""
MOST_ITERATIONS = 100
ROUNDING = 10 * float(np.finfo(np.float32).eps)
"""A component is rounding if the norm of its scores is at most this part of the norm of all features, mean included."""

product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Components(NamedTuple):
    """The first components of images' features, the one that explains most first. Fp32.

    Attributes:
      scores: each token's coordinate along each component, of features without their mean.
      explained: the part of the variance that each component explains, 0 to 1.
    """

    scores: Float[Array, "batch tokens count"]
    explained: Float[Array, "batch count"]


@partial(jax.jit, static_argnames=("count", "joint"))
def principal_components(
    features: Float[Array, "batch tokens dim"], count: int = 3, *, joint: bool = False
) -> Components:
    """Returns the first `count` principal components of each image's features, computed in fp32.

    Of each component, the score of largest magnitude is positive. Components that features do not have, because they
    are constant or have fewer tokens or dimensions than `count`, are zeros. Iterations start from the same directions
    each time, and end when the leading ones change by less than 1e-5 (`TOLERANCE`), at the latest after 100: where the
    variance is spread evenly over many components, the last ones returned are then mixtures of near-equal ones.

    Args:
      joint: one basis for all images, centred by the mean over all. Then `explained` is of all of them together, and
        the same for each.

    Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected at least one component")
    batch, tokens, dim = features.shape
    if not joint:
        return Components(*jax.vmap(partial(_components_of_one, count=count))(features))
    scores, explained = _components_of_one(features.reshape(batch * tokens, dim), count)
    return Components(scores.reshape(batch, tokens, count), jnp.broadcast_to(explained, (batch, count)))


def _components_of_one(
    features: Float[Array, "tokens dim"], count: int
) -> tuple[Float[Array, "tokens count"], Float[Array, " count"]]:
    features = features.astype(jnp.float32)
    smallest = ROUNDING * jnp.linalg.norm(features)
    centred = features - features.mean(axis=0)
    directions, _ = leading_directions(centred, count, smallest)
    scores = product(centred, directions)
    lengths = jnp.linalg.norm(scores, axis=0)
    greatest = jnp.take_along_axis(scores, jnp.abs(scores).argmax(axis=0)[None], axis=0)
    absent = lengths <= smallest  # false for NaN, which is to be seen
    scores = jnp.where(absent, 0, jnp.where(greatest < 0, -scores, scores))
    total = jnp.square(centred).sum()
    explained = jnp.minimum(jnp.square(lengths) / jnp.where(total > 0, total, 1), 1)
    explained = jnp.where(absent, 0, explained)
    missing = count - scores.shape[1]
    return jnp.pad(scores, ((0, 0), (0, missing))), jnp.pad(explained, (0, missing))


def leading_directions(
    centred: Float[Array, "tokens dim"], count: int, smallest: Float[Array, ""]
) -> tuple[Float[Array, "dim found"], Int[Array, ""]]:
    """Returns the directions of the largest variance, at most `count`, as unit vectors, and the number of iterations.

    Args:
      smallest: a singular value that is not larger is rounding: its direction need not come to rest.
    """
    tokens, dim = centred.shape
    width = min(count + OVERSAMPLING, tokens, dim)
    found = min(count, width)
    # NumPy's numbers, because JAX's depend on its configuration.
    start = jnp.asarray(np.random.default_rng(0).standard_normal((dim, width)), jnp.float32)

    def step(state):
        directions, values, _, iterations = state
        along_tokens, _ = jnp.linalg.qr(product(centred, directions))
        basis, small = jnp.linalg.qr(product(centred.T, along_tokens))
        # Rayleigh-Ritz without squares of the features: the small factor has the block's singular values.
        rotation, new_values, _ = jnp.linalg.svd(small)
        new = product(basis, rotation)
        wanted, before = new[:, :found], directions[:, :found]
        turned = jnp.linalg.norm(wanted * jnp.sign((wanted * before).sum(axis=0)) - before, axis=0)
        moved = jnp.abs(new_values - values)[:found] / jnp.where(new_values[0] > 0, new_values[0], 1)
        change = jnp.where(new_values[:found] <= smallest, 0, jnp.maximum(turned, moved)).max()
        return new, new_values, change, iterations + 1

    unsettled = lambda state: (state[2] > TOLERANCE) & (state[3] < MOST_ITERATIONS)
    first = (start, jnp.zeros(width, jnp.float32), jnp.array(jnp.inf, jnp.float32), jnp.array(0))
    directions, _, _, iterations = jax.lax.while_loop(unsettled, step, first)
    return directions[:, :found], iterations


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockComponents:
    """Principal components of the image tokens' queries, keys and values, in this order. Fp32. A pytree.

    Features are all heads as one vector, as attention takes them: where a model normalises queries and keys, after
    that. Where several blocks are stacked, blocks follow images: [images, blocks, ...].

    Attributes:
      scores: each token's coordinate along each component (see `principal_components`), tokens by rows of the grid.
      explained: the part of the variance that each component explains, 0 to 1.
    """

    scores: Float[Array, "*lead 3 tokens count"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    explained: Float[Array, "*lead 3 count"] | Any


@jax.tree_util.register_static
@dataclass(frozen=True)
class ComponentsReader:
    """Reads `BlockComponents` of a captured block (see `models.attention.Reader`). A pytree without arrays.

    Attributes:
      count: how many components.
      joint: one basis for all images of the batch.
    """

    count: int = 3
    joint: bool = False

    @property
    def normalized_queries(self) -> tuple[Stream, ...]:
        return ()

    def about(self, conditioning: TextConditioning) -> ComponentsReader:
        return self

    def read(self, joint: JointQKV) -> BlockComponents:
        image = [x[:, : joint.image_tokens] for x in (joint.q, joint.k, joint.v)]
        features = jnp.stack([x.reshape(*x.shape[:2], -1) for x in image])
        # One after the other: each stops when it is done, and only one at a time is there in fp32.
        found = jax.lax.map(partial(principal_components, count=self.count, joint=self.joint), features)
        return BlockComponents(*(jnp.moveaxis(each, 0, 1) for each in found))


@partial(jax.jit, static_argnames=("blocks", "count", "joint", "kernel"))
def block_components(
    transformer: MMDiT,
    images: NoisedImages,
    texts: TextConditioning,
    *,
    blocks: tuple[int, ...] | None = None,
    count: int = 3,
    joint: bool = False,
    kernel: Kernel | None = None,
) -> BlockComponents:
    """Returns the components of blocks, stacked [images, blocks, ...], from one pass that ends in the last of them.

    Args:
      blocks: their numbers, in order. Default: all that the transformer holds.
      count: how many components.
      joint: of each block and projection one basis for all images, so that a score means the same in each.

    Raises as `trunk.attentions_at` does.
    """
    blocks = tuple(range(transformer.depth)) if blocks is None else blocks
    options = ForwardOptions(ComponentsReader(count, joint), kernel)
    latents, timesteps = images.inputs()
    records = attentions_at(transformer, latents, timesteps, texts, blocks=blocks, options=options)
    return jax.tree.map(lambda *each: jnp.stack(each, axis=1), *(records[block] for block in blocks))
