"""Options that do not fit, or not each other, come in one message; and a run may ask for no pictures."""

from __future__ import annotations

import re
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import get_type_hints

import pytest

from seg4diff_jax.command_line import evaluate as evaluation
from seg4diff_jax.command_line.tasks import TASKS
from seg4diff_jax.command_line.train import main, parse
from seg4diff_jax.configuration import problems, refuse, section, unchecked
from seg4diff_jax.evaluation.options import Options
from seg4diff_jax.evaluation.options import parse as parse_evaluation
from seg4diff_jax.magnet.task import MagnetConfig
from seg4diff_jax.miniature.flow_matching import FlowMatchingConfig
from seg4diff_jax.training.sample_pictures import Samples, asked_for

ROOT = Path(__file__).parents[2]
PRIOR = str(ROOT / "configs" / "eval" / "miniature_prior.json")
MINIATURE = ["--config", str(ROOT / "configs" / "magnet" / "miniature.yaml")]


def lines(message: str) -> list[str]:
    return [line.strip() for line in message.splitlines()]


def test_all_that_does_not_fit_in_a_training_configuration_comes_in_one_message(capsys):
    """Of sections, of the whole, of sections together, and of numbers that only a table bounds."""
    wrong = {
        "data.rows": 0,
        "data.least_area": 5,
        "lora.rank": 0,
        "lora.alpha": -1,
        "objective.focal_weight": -1,
        "kernel.name": "xla",
        "kernel.query_chunk": 0,
        "held_out.sigmas": "[2]",
        "data.crop": "random",
        "positions": "release",
        "objective.targets": "matching",
        "optimizer.warmup": 5000,
        "run.seed": -1,
    }
    assert main([*MINIATURE, *(f"--{name}={value}" for name, value in wrong.items())]) == 1
    said = lines(capsys.readouterr().err)
    begins = [
        "error: 13 things do not fit:",
        "data.rows is 0",
        "data.least_area is 5.0",
        "held_out.sigmas are [2.0]",
        "lora.rank is 0",
        "objective.masks_from is 'log_probs'",
        "objective.focal_weight is -1.0",
        "kernel.query_chunk is 0",
        "data.name is 'scenes', data.captions None and objective.targets 'matching'",
        "positions is 'release', but matching knows no names",
        "cache is 'runs/magnet/miniature_cache' and data.crop 'random'",
        "optimizer.warmup is 5000; expected less than the run's 1000 steps",
        "run.seed is -1",
        "lora.alpha is -1.0",
    ]
    assert len(said) == len(begins)
    assert all(line.startswith(begin) for line, begin in zip(said, begins, strict=True)), said


def test_a_single_one_is_said_as_it_is():
    with pytest.raises(ValueError, match=r"^samples\.count is -1; expected at least 1, or 0 for no pictures$"):
        parse([*MINIATURE, "--samples.count=-1"])


def test_data_that_lies_nowhere_is_said_with_the_rest():
    with pytest.raises(ValueError, match=r"(?s)run\.keep is 0.*data\.root is 'x' and data.name 'scenes'"):
        parse([*MINIATURE, "--data.root=x", "--run.keep=0"])


def test_in_python_a_dataclass_refuses_with_all_of_its_own():
    with pytest.raises(ValueError, match=r"samples\.count is -1.*\nsamples\.steps is 0.*\nguidance is nan"):
        Samples(count=-1, steps=0, guidance=float("nan"))


@pytest.mark.parametrize("task", TASKS)
def test_every_section_that_checks_itself_says_its_problems(task):
    """One that only raised would have the next one's hidden behind its own."""

    def sections(kind):
        yield kind
        hints = get_type_hints(kind)
        for field in fields_of(kind):
            inner, _ = section(hints[field.name])
            if inner is not None:
                yield from sections(inner)

    silent = [each for each in sections(TASKS[task].config) if hasattr(each, "__post_init__")]
    assert silent
    assert all(callable(getattr(each, "problems", None)) for each in silent)


def test_problems_of_sections_are_named_by_their_place():
    @dataclass(frozen=True)
    class Inner:
        count: int

        def problems(self) -> list[str]:
            return [f"count is {self.count}"] if self.count < 1 else []

    @dataclass(frozen=True)
    class Outer:
        first: Inner
        second: Inner | None

    Outer.__annotations__ = {"first": Inner, "second": Inner | None}
    made = unchecked(Outer, {"first": {"count": 0}, "second": {"count": -1}})
    assert is_dataclass(made)
    assert problems(made) == ["first.count is 0", "second.count is -1"]
    assert problems(unchecked(Outer, {"first": {"count": 1}, "second": None})) == []
    refuse([])
    with pytest.raises(ValueError, match=r"^count is 0$"):
        refuse(["count is 0", "count is 0"])


def test_all_that_does_not_fit_in_an_evaluation_comes_in_one_message(tmp_path, capsys):
    options = "--blocks 99 --heads 7 --seeds x --steps 40 --prompts some --pictures -1 --shard-batches 0"
    data = "--data.root x --data.split y --data.unlabelled ignored --data.labels z"
    unused = "--unsupervised.threshold 1 --unsupervised.match row"
    out = ["--out", str(tmp_path / "out")]
    masks = "--masks.rounds 99 --masks.views 3 --masks.mirrored"
    assert evaluation.main([*options.split(), *data.split(), *unused.split(), *masks.split(), *out]) == 1
    first, *said = lines(capsys.readouterr().err)
    assert first == "error: 14 things do not fit:"
    (mirrored,) = [line for line in said if line.startswith("--masks.mirrored ")]
    assert mirrored == "--masks.mirrored takes every second view, and views is 3; expected an even number"
    said.remove(mirrored)
    named = {line.split(" is ")[0] for line in said}
    assert named == {
        *("data.split", "data.unlabelled", "data.labels", "--pictures", "--shard-batches", "--heads", "--blocks"),
        *("--steps", "--seeds", "--prompts", "--unsupervised.threshold", "--unsupervised.match", "--masks.rounds"),
    }


def test_an_evaluation_of_what_fits_is_not_refused():
    from seg4diff_jax import open as open_checkpoint

    settings = evaluation.settle(Options(heads="mean,all", seeds=1), open_checkpoint("miniature"), 1).settings
    assert (settings.heads, settings.seeds) == ((None, 0, 1, 2, 3), (1,))


def test_masks_that_a_checkpoint_cannot_make_are_refused_and_the_last_block_that_they_need_is_loaded():
    from seg4diff_jax import MaskOptions
    from seg4diff_jax import open as open_checkpoint

    checkpoint = open_checkpoint("miniature")
    absent = MaskOptions(rounds=1, refine_block=6)
    with pytest.raises(ValueError, match=r"refine_block is 6; blocks 0\.\.5 are loaded, and block 3 is read"):
        evaluation.settle(Options(masks=absent), checkpoint, 1)
    later = MaskOptions(rounds=1, refine_block=5)
    assert evaluation.settle(Options(masks=later), checkpoint, 1).settings.last_block == 5
    assert evaluation.settle(Options(), checkpoint, 1).settings.last_block == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": {"prior": 0.4}}, "prior is 0.4, the power of a class prior, and none is given"),
        ({"class_prior": PRIOR}, "a class prior is given, but its power, prior, is 0; expected more than 0"),
        ({"class_prior": PRIOR, "masks": {"prior": 0.4}, "blocks": 2}, "the class prior is block 3's, and block 2 is"),
        (
            {"class_prior": PRIOR, "masks": {"prior": 0.4}, "heads": "mean,1"},
            "--class-prior is of the mean of a block's heads, and --heads is 'mean,1'",
        ),
        ({"class_prior": "absent.json", "masks": {"prior": 0.4}}, "absent.json: no such file; expected what `seg4diff"),
        (
            {"masks": {"reading": "concepts", "rounds": 1, "refine_block": 5}},
            "refine_block is 5, and with concepts nothing after block 3 is run",
        ),
    ],
)
def test_a_class_prior_that_an_evaluation_cannot_use_is_refused(options, message):
    from seg4diff_jax import MaskOptions
    from seg4diff_jax import open as open_checkpoint

    given = options | {"masks": MaskOptions(**options.get("masks", {}))}
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluation.settle(Options(**given), open_checkpoint("miniature"), 1)


def test_a_class_prior_is_read_before_the_weights():
    from seg4diff_jax import MaskOptions
    from seg4diff_jax import open as open_checkpoint

    given = Options(class_prior=PRIOR, masks=MaskOptions(prior=0.4))
    settings = evaluation.settle(given, open_checkpoint("miniature"), 1).settings
    assert settings.prior is not None
    assert len(settings.prior.means) == 22


def test_options_of_masks_are_read_from_a_file_and_from_the_terminal(tmp_path):
    options = parse_evaluation(["--config", str(ROOT / "configs/eval/miniature_best.yaml"), "--masks.rounds=3"]).masks
    assert (options.views, options.prior, options.rounds, options.refine_heads) == (1, 0.4, 3, (0, 2, 3))
    assert parse_evaluation(["--masks.views=2", "--masks.levels=[2,3]"]).masks.levels == (2, 3)


def test_a_batch_that_devices_cannot_share_is_said_with_all_else_that_does_not_fit():
    from seg4diff_jax import open as open_checkpoint

    with pytest.raises(ValueError, match=r"(?s)^2 things do not fit:.*--batch-size is 4.*--heads is '9'"):
        evaluation.settle(Options(heads="9", batch_size=4), open_checkpoint("miniature"), 3)


@pytest.mark.parametrize("samples", [None, Samples(count=0)])
def test_a_count_of_0_asks_for_no_pictures(samples):
    assert not asked_for(samples)
    assert asked_for(Samples(count=1))


def test_no_pictures_need_no_held_out_ones(monkeypatch, tmp_path):
    _, config, *_ = parse([*MINIATURE, "--samples.count=0", "--held_out.count=0"])
    assert isinstance(config, MagnetConfig)
    with pytest.raises(ValueError, match=r"^samples show prompts of held-out pictures, and none are"):
        parse([*MINIATURE, "--held_out.count=0"])
    flow = ["--config", str(ROOT / "configs" / "miniature" / "flow_matching.yaml"), "--samples.count=0"]
    assert isinstance(parse(flow).config, FlowMatchingConfig)
    cached = [f"--cache={tmp_path / 'cache'}", "--data.scenes=4", "--held_out.count=2", "--data.size=32"]
    _, config, *_ = parse([*MINIATURE, *cached, "--samples.count=0"])
    task = TASKS["magnet"].make(config)
    assert task.pictures is None
    assert task.evaluate is not None
