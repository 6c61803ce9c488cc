"""Section 4, Tables 1 to 3: what MAGNET's adapters change in masks and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from seg4diff_jax.analysis.paired_difference import paired_difference
from seg4diff_jax.analysis.picture_scores import clip_t
from seg4diff_jax.analysis.prompt_statistics import noised_squares
from seg4diff_jax.evaluation.measurement import Settings
from seg4diff_jax.evaluation.run import evaluate
from seg4diff_jax.flow import velocity_loss, velocity_target
from seg4diff_jax.magnet.held_out import HeldOutData
from seg4diff_jax.magnet.items import MaskData
from seg4diff_jax.magnet.noise_levels import NoiseLevels
from seg4diff_jax.magnet.objective import MagnetObjective
from seg4diff_jax.magnet.task import MagnetConfig, task
from seg4diff_jax.passes import velocity
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.reporting.overlays import contact_sheet
from seg4diff_jax.reproduction.components import labelled_items
from seg4diff_jax.reproduction.parts import (
    ABOVE_ZERO,
    Claim,
    Measured,
    Part,
    Step,
    Table,
    decided,
    decided_by,
    in_words,
)
from seg4diff_jax.reproduction.subject import GUIDANCE, STEPS, OnProgress, Subject
from seg4diff_jax.segmentation.unsupervised_scores import UNSUPERVISED_PROTOCOLS
from seg4diff_jax.training.loop import RunConfig, train
from seg4diff_jax.training.optimizers import OptimizerConfig

SHEET, FOLDERS = "magnet.png", ("magnet", "magnet_cache")
LOSS_IMAGES, LOSS_STEPS = 32, (4, 8, 14, 21)
SHOWN, CELL = 8, 160


STEPS_IN_SMALL, BATCH_IN_SMALL = 100, 8


def in_small(folder: Path) -> MagnetConfig:
    """Returns the miniature's recipe, configs/magnet/miniature.yaml, with fewer steps, scenes and held-out scenes."""
    return MagnetConfig(
        RunConfig(str(folder / "magnet"), STEPS_IN_SMALL, BATCH_IN_SMALL, evaluate_every=100, checkpoint_every=50),
        "miniature",
        data=MaskData("scenes", scenes=800, crop="center", rows=8),
        held_out=HeldOutData(count=16, batch_size=16),
        objective=MagnetObjective(masks_from="log_probs", focal_weight=0.2, dice_weight=0.4),
        noise_levels=NoiseLevels(-2.0, 0.8),
        optimizer=OptimizerConfig(3e-3, warmup=20, average=0.99),
        cache=str(folder / "magnet_cache"),
        remat="nothing",
    )


def measure(subject: Subject, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Scores the model without adapters and with them. Those of the miniature are trained first."""
    adapters = subject.adapters
    if adapters is None:
        if subject.name != "miniature":
            return {"adapters": None}
        config = in_small(folder)
        train(task(config), config.run, config.optimizer, asdict(config), resume=True)
        adapters = Path(config.run.out) / "export"
    on_progress(0.5)
    dtype = subject.pipe.transformer.context_embed.dtype
    tuned = subject.checkpoint.load(lora=adapters, dtype=dtype, mesh=subject.pipe.mesh)
    found: dict[str, Any] = {"adapters": str(adapters), "trained": subject.adapters is None}
    pictures = {}
    for number, (name, pipe) in enumerate({"without": subject.pipe, "with": tuned}.items()):
        found[name] = _masks(subject, pipe)
        found[name]["velocity_loss"] = velocity_losses(subject, pipe).mean(axis=1).tolist()
        pictures[name] = _pictures(subject, pipe)
        if subject.scorers is not None:
            cosines = clip_t(subject.scorers.clip, pictures[name], subject.prompts)
            found[name]["cosines"] = (100 * cosines.astype(np.float64)).tolist()
        on_progress(0.75 + 0.25 * number)
    cells = [(name, "", _enlarged(each)) for name, made in pictures.items() for each in made[:SHOWN]]
    contact_sheet(cells, longest=4000, columns=min(SHOWN, len(subject.prompts))).save(folder / SHEET)
    return found


def _enlarged(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    scale = CELL / max(image.size)
    return image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.LANCZOS)


def _masks(subject: Subject, pipe: Pipeline) -> dict[str, list[float]]:
    """Returns the expert block's mean IoU in percent for each seed: of classes that are there, and without names."""
    settings = Settings(
        (subject.expert,),
        (pipe.expert_step,),
        subject.seeds,
        min(subject.batch_size, len(subject.benchmark.source)),
        unsupervised=(UNSUPERVISED_PROTOCOLS["ours"],),
    )
    rows = evaluate(pipe, subject.benchmark, settings).rows
    kinds = {"present": "miou", "empty": "unsupervised"}
    return {title: [_number(row.metrics.miou) for row in rows if row.prompts == kind] for kind, title in kinds.items()}


def _number(score: float | None) -> float:
    return np.nan if score is None else score


def velocity_losses(subject: Subject, pipe: Pipeline) -> Float[np.ndarray, "levels images"]:
    """Returns the flow-matching loss of labelled images at several noise levels, under the names of their classes."""
    found = []
    for place, item in enumerate(labelled_items(subject.benchmark, pipe.tokenizers, LOSS_IMAGES)):
        texts, own = pipe.encode_prompts([item["prompt"]]), []
        for step in LOSS_STEPS:
            images = noised_squares(pipe, [item["image"]], step=step, first=place)
            with pipe.settings():
                predicted, _ = velocity(pipe.transformer, images, texts)
            target = velocity_target(jnp.asarray(images.latents), jnp.asarray(images.noise))
            own.append(float(velocity_loss(predicted, target)[0]))
        found.append(own)
    return np.array(found).T


def _pictures(subject: Subject, pipe: Pipeline) -> list[np.ndarray]:
    made = []
    size = pipe.view.size((0, 0), None, "square")
    for places in subject.prompt_batches():
        filled = [*places, *[places[-1]] * (subject.batch_size - len(places))]
        noise = np.asarray(pipe.view.noise(None, filled, len(subject.prompts), size, subject.seeds[0]))
        prompts = [subject.prompts[place] for place in filled]
        made += pipe.generate(prompts, steps=STEPS, guidance=GUIDANCE, noise=noise)[: len(places)]
    return made


def present(subject: Subject, measured: Mapping[str, Measured]) -> Part:
    found = measured[STEP.name]
    title = "MAGNET: fine-tuned on masks"
    if found["adapters"] is None:
        claim = Claim(
            "4", "MAGNET improves masks and pictures.", "Adapters are given.", "none: --lora FILE", "not testable here"
        )
        return Part(title, "No adapters were given, and only the miniature's are trained here.", [claim])
    rows = []
    for name in ("without", "with"):
        own = found[name]
        values = [_spread(own["miou"]), _spread(own["unsupervised"]), f"{np.mean(own['velocity_loss']):.4f}"]
        values.append(f"{np.mean(own['cosines']):.2f}" if "cosines" in own else "-")
        rows.append((f"{name} adapters", values))
    trained = (
        "Trained for this page: 100 steps of 8 of 800 scenes, where the recipe has 1000 of 4800."
        if found["trained"]
        else f"Adapters: {found['adapters']}."
    )
    return Part(
        title,
        f"{trained} mIoU of the expert block, mean and standard deviation over {len(found['with']['miou'])} seeds of "
        f"the noise; the flow-matching loss of images under the names of their classes, at noise levels "
        f"{', '.join(map(str, LOSS_STEPS))}; CLIPScore as 100 x cosine of {len(subject.prompts)} pictures.",
        _claims(found),
        tables=[Table("", ["mIoU, %", "mIoU without names, %", "flow-matching loss", "CLIPScore"], rows)],
        pictures=[("The same prompts and noise: above without adapters, below with them", SHEET)],
    )


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def _claims(found: Measured) -> list[Claim]:
    claims = []
    for key, where, paper in (
        ("miou", "Table 1", "Trained on COCO, MAGNET raises mIoU on most sets (not on Cityscapes)."),
        ("unsupervised", "Table 2", "Trained on COCO, MAGNET raises mIoU without names."),
    ):
        before, after = np.array(found["without"][key]), np.array(found["with"][key])
        rule = "mIoU is higher with the adapters for each seed of the noise; not testable if seeds differ, or of one."
        agree = len(before) > 1 and bool((after > before).all() or (after < before).all())
        figures = f"{before.mean():.2f} to {after.mean():.2f} %"
        claims.append(Claim(where, paper, rule, figures, decided(bool((after > before).all()) if agree else None)))
    where, paper = "Table 3", "MAGNET raises CLIPScore."
    if "cosines" not in found["with"]:
        return [*claims, Claim(where, paper, ABOVE_ZERO, "no model scores pictures here", decided(None))]
    before, after = np.array(found["without"]["cosines"]), np.array(found["with"]["cosines"])
    apart = paired_difference(before, after, np.arange(len(before)))
    return [*claims, Claim(where, paper, ABOVE_ZERO, in_words(apart), decided_by(apart, len(before)))]


STEP = Step("finetuning", "MAGNET before and after", measure, present)
