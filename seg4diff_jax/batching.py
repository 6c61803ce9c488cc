"""Images as batches for the model: the size at which it sees them, their pixels, their noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from seg4diff_jax.flow import image_noise, is_whole
from seg4diff_jax.images import ImageInput, Resize, check_size, model_size, read_image, resize, to_model_range
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.vae import VAEConfig


class SizeGroup(NamedTuple):
    """Images of a list that the model sees at one size.

    Attributes:
      places: in the list.
      own_sizes: height and width of each before it was resampled.
      grid: rows and columns of image tokens.
      pixels: in -1..1.
    """

    places: list[int]
    own_sizes: list[tuple[int, int]]
    grid: tuple[int, int]
    pixels: Float[np.ndarray, "images height width 3"]


@dataclass(frozen=True)
class ModelView:
    """How a model sees images.

    Attributes:
      trained: side in pixels of the squares that it was trained on.
      multiple: what the sides of an image must be a multiple of; `largest`: the longest that its positions reach.
      downsampling: pixels of a side to one latent; `channels`: of latents.
    """

    trained: int
    multiple: int
    largest: int
    downsampling: int
    channels: int

    @classmethod
    def of(cls, transformer: MMDiTConfig, vae: VAEConfig, trained: int) -> ModelView:
        multiple = vae.downsampling * transformer.patch_size
        return cls(trained, multiple, multiple * transformer.pos_embed_max_size, vae.downsampling, vae.latent_channels)

    def size(self, image: tuple[int, int], size: tuple[int, int] | None, how: Resize) -> tuple[int, int]:
        """Height and width at which an image is seen, `size` if given. Raises ValueError for one that cannot be."""
        if how not in get_args(Resize):
            raise ValueError(f"resize is {how!r}; expected one of {', '.join(get_args(Resize))}")
        limits = {"multiple": self.multiple, "largest": self.largest}
        if size is None and how == "aspect":
            return model_size(*image, trained=self.trained, **limits)
        return check_size((self.trained, self.trained) if size is None else size, **limits)

    def pixels(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], size: tuple[int, int], how: Resize
    ) -> Float[np.ndarray, "images height width 3"]:
        """In -1..1."""
        return np.stack([to_model_range(resize(image, size, how)) for image in images])

    def noise(
        self,
        given: Shaped[np.ndarray, "*shape"] | None,
        places: list[int],
        images: int,
        size: tuple[int, int],
        seed: int,
    ) -> Float[Array, "batch rows columns channels"]:
        """Noise of those `places` of a list of images that are seen at `size`: the given, or drawn.

        Raises ValueError for noise that fits neither one image nor all, or is not finite, and for an unusable seed.
        """
        shape = (size[0] // self.downsampling, size[1] // self.downsampling, self.channels)
        if given is None:
            return image_noise(seed, places, shape)
        given = np.asarray(given)
        if given.shape not in (shape, (images, *shape)):
            raise ValueError(f"noise is {list(given.shape)}; expected {list(shape)} or {[images, *shape]}")
        if not np.isfinite(given).all():
            raise ValueError("noise has values that are not finite; expected standard normal numbers")
        return jnp.broadcast_to(jnp.asarray(given, jnp.float32), (images, *shape))[np.asarray(places)]

    def by_size(self, images: Sequence[ImageInput], size: tuple[int, int] | None, how: Resize) -> Iterator[SizeGroup]:
        """The images, those together that are seen at one size. Raises as `read_image` and `size` do."""
        read = [read_image(image) for image in images]
        places: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, image in enumerate(read):
            places[self.size(image.shape[:2], size, how)].append(place)
        for (height, width), group in places.items():
            own = [read[place] for place in group]
            grid = height // self.multiple, width // self.multiple
            yield SizeGroup(group, [image.shape[:2] for image in own], grid, self.pixels(own, (height, width), how))


def listed_seeds(seed: int | Sequence[int], noise: Any = None) -> tuple[int, ...]:
    """One seed, or several.

    Raises ValueError when there are none, one is there twice, or there are several and the noise is given.
    """
    seeds = tuple(seed) if isinstance(seed, Sequence | np.ndarray) else (seed,)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seed is {seed!r}; expected a whole number, or several, each once")
    if noise is not None and len(seeds) > 1:
        raise ValueError(f"seed is {seed!r} and noise is given, of which no seed makes others: leave one of them out")
    return seeds


def mean_over_seeds(each: Sequence[Any]) -> Any:
    """Of what several seeds gave, arrays or lists of them; of one as it is."""
    return each[0] if len(each) == 1 else jax.tree.map(lambda *of_seeds: sum(of_seeds) / len(of_seeds), *each)


def finite_maps(maps: np.ndarray, block: int) -> np.ndarray:
    """The maps of a block. Raises FloatingPointError unless all numbers are finite."""
    if not np.isfinite(maps).all():
        raise FloatingPointError(f"scores of block {block} are not finite: damaged weights or inputs")
    return maps


def one_for_each(prompts: Sequence[str], images_per_prompt: int) -> list[str]:
    """The prompt of each image, those of the first prompt first.

    Raises ValueError unless `images_per_prompt` is a whole number, at least 1.
    """
    if not is_whole(images_per_prompt, 1):
        raise ValueError(f"images_per_prompt is {images_per_prompt!r}; expected a whole number, at least 1")
    return [prompt for prompt in prompts for _ in range(images_per_prompt)]
