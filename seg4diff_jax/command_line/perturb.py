"""What becomes of pictures when one block's image-to-text attention is perturbed.

    seg4diff perturb --prompts prompts.txt --model sd3 --out runs/perturbed
    seg4diff perturb --prompt "a cat on a sofa" --blocks 0 9 --guide 2 --model sd3

The first makes the picture of each prompt with each block perturbed in turn, and scores it against the unperturbed one
of the same seed. The second guides pictures away from what the perturbed model predicts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_args

from jsonargparse import ArgumentParser

from seg4diff_jax.command_line.segment import model_arguments, parse_size
from seg4diff_jax.flow import LARGEST_SEED, Sampler, check_guidance, check_seed
from seg4diff_jax.models.perturbation import PAPER_KERNEL, Blur, Change, Half, Pad, Perturbation

OF_BLUR = ("sigma", "kernel", "pad", "over", "columns")


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("--prompt", type=str, help="what to picture, such as: 'a cat on a sofa'")
    add("--prompts", type=str, metavar="FILE", help="the same by file, a prompt a line")
    add("--out", type=str, help="directory for the results; default: runs/perturb/<prompt or file>-<time>")
    add("--overwrite", action="store_true", help="replace files of an earlier run in --out")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--blocks", type=int, nargs="+", metavar="BLOCK", help="blocks to perturb, one at a time; default: all")
    add("--change", choices=["blur", "skip"], default="blur", help="blur image-to-text attention, or skip the block")
    add("--sigma", type=float, help="of the Gaussian blur, in tokens; default: 9")
    add("--kernel", type=int, help=f"taps of the blur; default: {PAPER_KERNEL}, or 6 sigma, made odd, over the image")
    add(
        "--pad",
        choices=list(get_args(Pad)),
        help="beyond the ends: symmetric (the default) keeps each row's mass, reflect is PyTorch's",
    )
    add("--over", choices=["text", "image"], help="blur along the text, the default, or over the image plane")
    add("--columns", choices=["clip", "all"], help="text tokens that are blurred: CLIP's, the default, or T5's too")
    add("--half", choices=list(get_args(Half)), default="both", help="of guidance, which half is perturbed")
    add("--at-steps", type=int, nargs="+", metavar="STEP", help="steps to perturb: 1 is the last; default: all")
    add("--guide", type=float, metavar="SCALE", help="guide pictures away from the perturbed prediction")
    add("--steps", type=int, default=28, help="Euler steps from noise to picture")
    add("--guidance", type=float, default=7.5, help="scale; at 1 or less there is none, and a step costs half")
    add("--sampler", choices=list(get_args(Sampler)), help="as for generate")
    add("--seed", type=int, default=0, help=f"of the noise: 0 to {LARGEST_SEED}")
    add("--seeds", type=int, default=1, help="how many seeds, from --seed on")
    add("--size", type=str, metavar="HxW", help="height x width of the pictures, as in 768x1024; default: as trained")
    add("--batch", type=int, default=4, help="pictures made at once; more need more memory and change none")
    add("--clip", type=str, metavar="MODEL", help="the CLIP that scores; default: the checkpoint's own, if it has one")
    add("--dino", type=str, metavar="MODEL", help="the DINO that scores; default: none")
    model_arguments(parser)


@dataclass(frozen=True)
class Asked:
    """The options, checked as far as they can be without a model.

    Attributes:
      seeds: of the noise.
      size: height and width of the pictures; None: as trained.
      change, steps, half: as for `Perturbation`.
    """

    seeds: tuple[int, ...]
    size: tuple[int, int] | None
    change: Change
    steps: tuple[int, ...] | None
    half: Half

    def of_blocks(self, blocks: tuple[int, ...]) -> Perturbation:
        """Returns the perturbation of some blocks. Raises ValueError for a block that is named twice."""
        return Perturbation(blocks, self.change, self.steps, self.half)


def run(options: Any) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns that PyTorch is missing
    run_asked = import_module("seg4diff_jax.command_line.perturbation").run  # its plots and page are of an extra
    run_asked(options, asked(options))


def asked(options: Any) -> Asked:
    """Raises ValueError for options that are out of bounds, or would change nothing."""
    if (options.prompt is None) == (options.prompts is None):
        found = "neither" if options.prompt is None else "both"
        raise ValueError(f"say what to picture: --prompt, or --prompts FILE with a prompt a line: found {found}")
    for name in ("seeds", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}: expected at least 1")
    check_guidance(options.guidance)
    if options.guide is not None:
        try:
            check_guidance(options.guide)
        except ValueError as error:
            raise ValueError(str(error).replace("guidance", "--guide", 1)) from None
        if options.guide <= 0:
            raise ValueError(
                f"--guide is {options.guide:g}: expected a scale above 0; leave it out to perturb the runs"
            )
    if options.half != "both" and options.guide is not None:
        raise ValueError("--half is of runs that are perturbed themselves: leave out --half, or --guide")
    if options.half != "both" and options.guidance <= 1:
        raise ValueError(f"--half is of guidance, and --guidance {options.guidance:g} is none: leave out --half")
    change = _change(options)
    steps = None if options.at_steps is None else tuple(options.at_steps)
    Perturbation((0,), change, steps, options.half).of_steps(options.steps)
    seeds = tuple(check_seed(options.seed + number) for number in range(options.seeds))
    return Asked(seeds, parse_size(options.size), change, steps, options.half)


def _change(options: Any) -> Change:
    given = {name: value for name in OF_BLUR if (value := getattr(options, name)) is not None}
    if options.change == "skip":
        if given:
            raise ValueError(f"--{next(iter(given))} is of --change blur: leave it out, or --change skip")
        return "skip"
    columns: Any = {"clip": "clip", "all": (0, None)}[given.pop("columns", "clip")]
    blur = Blur(**given, text_tokens=columns)
    if Perturbation((0,), blur).is_nothing:
        name = "sigma" if blur.kernel is None or blur.sigma == 0 else "kernel"
        raise ValueError(f"--{name} {getattr(blur, name):g} is no blur: choose a wider one")
    return blur
