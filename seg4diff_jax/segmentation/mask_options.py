"""How masks are made of attention, beyond the mean of one block's heads: views, balance, refinement, edges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from seg4diff_jax.checked import Checked
from seg4diff_jax.segmentation.class_prior import ClassPrior

Normalization = Literal["none", "content", "minmax"]
Reading = Literal["prompt", "concepts", "concept outputs"]
MOST_ROUNDS, MOST_VIEWS, MOST_EDGE_ROUNDS = 20, 64, 100


@dataclass(frozen=True)
class MaskOptions(Checked):
    """How class maps are fused and refined. Static under jit. The default is the paper's: one map, not refined.

    Attributes:
      views: how often each image is noised; the maps are averaged. A row of the batch for each.
      mirrored: every second view sees the mirrored latents, and its maps are mirrored back.
      levels: noise levels of the views in turn, counted from the clean end of 28. Empty: all at the level asked for.
      reading: where class words stand. `prompt`: in the text that images read, as in the paper. `concepts`: in
        tokens that read the image and that nothing reads (`models.concepts`), beside an empty text; then any
        number of prompts is one pass of the image. `concept outputs`: not the attention to these, but how alike their
        attention's output is to that of each image token, as in ConceptAttention.
      normalize: `content` divides each image token's attention by what it gives to all class words of its prompt;
        `minmax` brings each class's map to 0..1 over the image.
      balance: 0 to 1: each class's map is divided by its mean over the image to this power. At 1 all classes have equal
        mass, so that words which draw attention everywhere lose what they have too much.
      prior: 0 to 1: each class's map is divided by its class prior to this power: by what its words draw on average in
        pictures that nobody labelled (`class_prior`).
      rounds: how often maps are averaged over image tokens that attend to each other (`refinement`). 0: never.
      sharpness: factor of the queries in that attention; above 1 it keeps to the most alike.
      refine_block, refine_heads: whose image-to-image attention it is. Default: the block that is read, all its heads.
      edge_radius: radius of the windows in which maps follow the image's edges (`guided_filter`), in image tokens.
        0: they do not.
      edge_smoothing: variance of pixels (0..1) below which a window has no edges.
      edge_rounds: how often maps are averaged over pixels of like colour (`pamr`): another way to the image's edges.
        0: never.
    """

    views: int = 1
    mirrored: bool = False
    levels: tuple[int, ...] = ()
    reading: Reading = "prompt"
    normalize: Normalization = "none"
    balance: float = 0.0
    prior: float = 0.0
    rounds: int = 0
    sharpness: float = 3.0
    refine_block: int | None = None
    refine_heads: tuple[int, ...] | None = None
    edge_radius: float = 0.0
    edge_smoothing: float = 1e-4
    edge_rounds: int = 0

    def problems(self) -> list[str]:
        """Returns what is wrong with the options, one sentence for each problem."""
        found = []
        if not 1 <= self.views <= MOST_VIEWS:
            found.append(f"views is {self.views}; expected 1 to {MOST_VIEWS}")
        if self.mirrored and self.views % 2:
            found.append(f"mirrored takes every second view, and views is {self.views}; expected an even number")
        if outside := [level for level in self.levels if not 1 <= level <= 28]:
            found.append(f"levels has {outside[0]}; expected noise levels of 1 (nearly clean) to 28 (pure noise)")
        if len(self.levels) > self.views:
            found.append(f"{len(self.levels)} levels for {self.views} views; expected a view for each level")
        if self.reading not in get_args(Reading):
            found.append(f"reading is {self.reading!r}; expected one of {', '.join(get_args(Reading))}")
        if self.reading == "concept outputs" and (self.normalize == "content" or self.prior or self.balance):
            found.append("concept outputs are no shares of attention: content, prior and balance mean nothing for them")
        if self.normalize not in get_args(Normalization):
            found.append(f"normalize is {self.normalize!r}; expected one of {', '.join(get_args(Normalization))}")
        for name, power in (("balance", self.balance), ("prior", self.prior)):
            if not 0 <= power <= 1:
                found.append(f"{name} is {power}; expected 0 to 1")
        if self.normalize == "minmax" and self.prior:
            found.append("prior scales whole maps, which minmax undoes; expected one of them")
        if not 0 <= self.rounds <= MOST_ROUNDS:
            found.append(f"rounds is {self.rounds}; expected 0 to {MOST_ROUNDS}")
        if not 0 < self.sharpness < float("inf"):
            found.append(f"sharpness is {self.sharpness}; expected a number above 0")
        heads = self.refine_heads
        if heads is not None and (not heads or len(set(heads)) < len(heads) or min(heads) < 0):
            found.append(f"refine_heads is {heads}; expected numbers of heads, each once, or None for all")
        if not self.rounds and (heads is not None or self.refine_block is not None):
            found.append("refine_block and refine_heads say how maps are refined; expected rounds of at least 1")
        if not 0 <= self.edge_radius < float("inf"):
            found.append(f"edge_radius is {self.edge_radius}; expected 0 or more, in image tokens")
        if not 0 < self.edge_smoothing < float("inf"):
            found.append(f"edge_smoothing is {self.edge_smoothing}; expected a number above 0")
        if not 0 <= self.edge_rounds <= MOST_EDGE_ROUNDS:
            found.append(f"edge_rounds is {self.edge_rounds}; expected 0 to {MOST_EDGE_ROUNDS}")
        if self.edge_radius > 0 and self.edge_rounds > 0:
            found.append("edge_radius and edge_rounds are two ways to the same edges; expected one of them")
        return found

    @property
    def follow_edges(self) -> bool:
        """Whether maps are made to follow the image's edges, one way or the other."""
        return self.edge_radius > 0 or self.edge_rounds > 0

    @property
    def mirrors(self) -> tuple[bool, ...]:
        """Whether each view is mirrored."""
        return tuple(self.mirrored and view % 2 == 1 for view in range(self.views))

    def level_of(self, view: int, asked: int) -> int:
        """Returns the noise level of a view."""
        return self.levels[view % len(self.levels)] if self.levels else asked

    def check_fits(self, block: int, depth: int, heads: int) -> None:
        """Raises ValueError when a model of `depth` loaded blocks with so many heads lacks a block or a head.

        Args:
          block: the block that is read.
        """
        last = self.refine_block
        if last is not None and not 0 <= last < depth:
            raise ValueError(f"refine_block is {last}; blocks 0..{depth - 1} are loaded, and block {block} is read")
        if last is not None and last > block and self.reading != "prompt":
            raise ValueError(f"refine_block is {last}, and with {self.reading} nothing after block {block} is run")
        if absent := [head for head in self.refine_heads or () if head >= heads]:
            raise ValueError(f"refine_heads has {absent[0]}; each block has heads 0..{heads - 1}")

    def check_prior(self, prior: ClassPrior | None, block: int) -> None:
        """Raises ValueError when a prior is given and not used, or used and not given, or another block's."""
        if self.prior and prior is None:
            raise ValueError(f"prior is {self.prior}, the power of a class prior, and none is given")
        if prior is not None and not self.prior:
            raise ValueError("a class prior is given, but its power, prior, is 0; expected more than 0, such as 0.4")
        if prior is not None and prior.block != block:
            raise ValueError(f"the class prior is block {prior.block}'s, and block {block} is read: measure it there")

    def stages(self) -> list[tuple[str, MaskOptions]]:
        """Returns what the options add to the paper's masks, one thing after the other, each with its name."""
        views = {"views": self.views, "mirrored": self.mirrored, "levels": self.levels}
        refinement = {name: getattr(self, name) for name in ("rounds", "sharpness", "refine_block", "refine_heads")}
        edges = {name: getattr(self, name) for name in ("edge_radius", "edge_smoothing", "edge_rounds")}
        steps = [
            (f"by {self.reading}", {"reading": self.reading}, self.reading != "prompt"),
            (f"{self.views} views", views, self.views > 1 or bool(self.levels)),
            (f"by {self.normalize}", {"normalize": self.normalize}, self.normalize != "none"),
            ("divided by the prior", {"prior": self.prior}, self.prior > 0),
            ("balanced", {"balance": self.balance}, self.balance > 0),
            (f"refined, {self.rounds} rounds", refinement, self.rounds > 0),
            ("edges", edges, self.follow_edges),
        ]
        found = [("the paper's masks", PAPERS_MASKS)]
        for name, added, is_asked in steps:
            if is_asked:
                found.append((name, replace(found[-1][1], **added)))
        return found


PAPERS_MASKS = MaskOptions()
"""One view, not refined: the paper's masks."""
REFINED_MASKS = MaskOptions(balance=0.3, rounds=2, edge_radius=1.0)
"""What `seg4diff segment --refine` does: of what was tried on the miniature the best that names no heads of its own."""
MASKS_WITH_PRIOR = MaskOptions(prior=0.4, rounds=2, edge_radius=1.0)
"""The same where a class prior was measured, which then takes the place of balance."""
