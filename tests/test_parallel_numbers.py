"""Models split over a mesh compute what they compute on one device, and so do their gradients."""

from __future__ import annotations

import json

import pytest

from tests.reference.processes import finish, start

LAYOUTS = ["2x2x2", "1x4x2", "1x2x4", "4x2x1", "4x1x2", "2x4x1", "2x1x4", "8x1x1", "1x8x1", "1x1x8"]
MODELS = ["layers", "mmdit", "adapters", "adapters, blocks computed again", "clip", "t5"]


def assert_equal_to_one_device(layouts: list[str]) -> None:
    (said,) = finish(start("split_models", *layouts, devices=8), seconds=1200)
    found = [json.loads(line) for line in said.splitlines()]
    assert [(row["model"], row["layout"]) for row in found] == [(model, at) for model in MODELS for at in layouts]
    assert {(row["model"], row["layout"]): row["error"] for row in found if row["error"] > 1e-4} == {}


def test_models_split_over_all_three_axes_equal_those_of_one_device():
    assert_equal_to_one_device(LAYOUTS[:1])


@pytest.mark.slow
def test_models_split_in_every_way_equal_those_of_one_device():
    assert_equal_to_one_device(LAYOUTS)
