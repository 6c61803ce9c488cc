"""Groups images into batches for the model: chooses the size at which it sees them, and makes pixels and noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from seg4diff_jax.flow import image_noise, is_whole
from seg4diff_jax.images import ImageInput, Resize, check_size, model_size, read_image, resize, to_model_range
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.vae import VAEConfig

Item = TypeVar("Item")


class SizeGroup(NamedTuple):
    """The images of a list that the model sees at one size.

    Attributes:
      places: the indices of these images in the list.
      own_sizes: height and width of each image before it was resampled.
      grid: rows and columns of image tokens.
      pixels: values in -1..1.
    """

    places: list[int]
    own_sizes: list[tuple[int, int]]
    grid: tuple[int, int]
    pixels: Float[np.ndarray, "images height width 3"]

    @property
    def items(self) -> tuple[list[int], list[tuple[int, int]], Float[np.ndarray, "images height width 3"]]:
        """Returns places, own sizes and pixels: of each image, in order."""
        return self.places, self.own_sizes, self.pixels


@dataclass(frozen=True)
class ModelView:
    """The sizes at which a model sees images, and the shape of its latents.

    Attributes:
      trained: side, in pixels, of the square images that the model was trained on.
      multiple: both sides of an image must be a multiple of this, in pixels.
      largest: longest side that the positional table allows, in pixels.
      downsampling: pixels per latent position along one side.
      channels: channels of the latents.
    """

    trained: int
    multiple: int
    largest: int
    downsampling: int
    channels: int

    @classmethod
    def of(cls, transformer: MMDiTConfig, vae: VAEConfig, trained: int) -> ModelView:
        """Makes the view of a model from the configurations of its transformer and VAE."""
        multiple = vae.downsampling * transformer.patch_size
        return cls(trained, multiple, multiple * transformer.pos_embed_max_size, vae.downsampling, vae.latent_channels)

    def size(self, image: tuple[int, int], size: tuple[int, int] | None, how: Resize) -> tuple[int, int]:
        """Returns the height and width at which the model sees an image: `size` if given, else as `how` says.

        Args:
          image: height and width of the image.

        Raises ValueError for a size that the model cannot see, and for an unknown `how`.
        """
        if how not in get_args(Resize):
            raise ValueError(f"resize is {how!r}; expected one of {', '.join(get_args(Resize))}")
        limits = {"multiple": self.multiple, "largest": self.largest}
        if size is None and how == "aspect":
            return model_size(*image, trained=self.trained, **limits)
        return check_size((self.trained, self.trained) if size is None else size, **limits)

    def common_size(self, images: Sequence[ImageInput], size: tuple[int, int] | None) -> tuple[int, int]:
        """Returns the height and width at which the model sees images of one size: `size`, or the images' aspect.

        Raises as `read_image` and `size` do; ValueError too for images of several sizes without `size`.
        """
        own = [read_image(image).shape[:2] for image in images]
        each = {self.size((height, width), size, "aspect") for height, width in own}
        if len(each) > 1:
            raise ValueError(f"the images are of {len(each)} sizes: name one for all pictures with size=")
        return each.pop()

    def pixels(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], size: tuple[int, int], how: Resize
    ) -> Float[np.ndarray, "images height width 3"]:
        """Resizes images to `size` and stacks them. Values are in -1..1."""
        return np.stack([to_model_range(resize(image, size, how)) for image in images])

    def noise(
        self,
        given: Shaped[np.ndarray, "*shape"] | None,
        places: list[int],
        images: int,
        size: tuple[int, int],
        seed: int,
        view: int = 0,
    ) -> Float[Array, "batch rows columns channels"]:
        """Returns the noise for some images of a list: from `given` if there is one, otherwise drawn.

        Args:
          given: noise for one image, which then serves all, or for each image of the list.
          places: indices in the list of the images that need noise. Drawn noise depends on `seed` and on this index.
          images: length of the list.
          size: height and width at which the model sees these images.
          view: of several draws with one seed, which.

        Raises ValueError for noise that fits neither one image nor all, or is not finite, and for an unusable seed.
        """
        shape = (size[0] // self.downsampling, size[1] // self.downsampling, self.channels)
        if given is None:
            return image_noise(seed, places, shape, view)
        given = np.asarray(given)
        if given.shape not in (shape, (images, *shape)):
            raise ValueError(f"noise is {list(given.shape)}; expected {list(shape)} or {[images, *shape]}")
        if not np.isfinite(given).all():
            raise ValueError("noise has values that are not finite; expected standard normal numbers")
        whole = np.broadcast_to(given.astype(np.float32), (images, *shape))
        return jax.device_put(whole[np.asarray(places)])

    def by_size(self, images: Sequence[ImageInput], size: tuple[int, int] | None, how: Resize) -> Iterator[SizeGroup]:
        """Reads images, and yields those of one size together. Raises as `read_image` and `size` do."""
        read = [read_image(image) for image in images]
        places: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, image in enumerate(read):
            places[self.size(image.shape[:2], size, how)].append(place)
        for (height, width), group in places.items():
            own = [read[place] for place in group]
            grid = height // self.multiple, width // self.multiple
            yield SizeGroup(group, [image.shape[:2] for image in own], grid, self.pixels(own, (height, width), how))


def listed_seeds(seed: int | Sequence[int], noise: Any = None) -> tuple[int, ...]:
    """Returns one seed or several as a tuple.

    Raises ValueError if there is none, if one is repeated, or if there are several and the noise is given.
    """
    seeds = tuple(seed) if isinstance(seed, Sequence | np.ndarray) else (seed,)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seed is {seed!r}; expected a whole number, or several, each once")
    if noise is not None and len(seeds) > 1:
        raise ValueError(f"seed is {seed!r} and noise is given, of which no seed makes others: leave one of them out")
    return seeds


def mean_over_seeds(each: Sequence[Any]) -> Any:
    """Returns the mean of the results of several seeds, arrays or lists of arrays. That of one seed is not changed."""
    return each[0] if len(each) == 1 else jax.tree.map(lambda *of_seeds: sum(of_seeds) / len(of_seeds), *each)


def finite_maps(maps: np.ndarray, block: int) -> np.ndarray:
    """Returns the maps of a block unchanged. Raises FloatingPointError unless all numbers are finite."""
    if not np.isfinite(maps).all():
        raise FloatingPointError(f"scores of block {block} are not finite: damaged weights or inputs")
    return maps


def one_for_each(prompts: Sequence[Item], images_per_prompt: int) -> list[Item]:
    """Repeats what each prompt has, such as itself, for its images: one for each. Images of one prompt are consecutive.

    Raises ValueError unless `images_per_prompt` is a whole number, at least 1.
    """
    if not is_whole(images_per_prompt, 1):
        raise ValueError(f"images_per_prompt is {images_per_prompt!r}; expected a whole number, at least 1")
    return [prompt for prompt in prompts for _ in range(images_per_prompt)]
