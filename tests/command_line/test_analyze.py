"""`seg4diff analyze`: which block gives the text most."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.command_line import main
from seg4diff_jax.command_line.analyze import text_attention
from seg4diff_jax.models.attention import AttentionRequest
from tests.reference.inputs import SQUARE, an_image


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(an_image(SQUARE, SQUARE)).save(path)
    return str(path)


def test_the_table_shows_each_blocks_share_and_marks_the_largest(sd3, sd3_checkpoint, picture, capsys):
    assert main(["analyze", picture, "house", "tree", "--find-expert", "--model", str(sd3_checkpoint)]) == 0
    table = capsys.readouterr().out
    request = AttentionRequest(text_tokens=(0, None), mean_heads=True)
    records = sd3.attention(picture, "house tree", request=request, size=(SQUARE, SQUARE))
    expected = {block: 100 * float(np.asarray(record.probs).sum(-1).mean()) for block, record in records.items()}
    found = {int(line[1]): float(line[2]) for line in re.finditer(r"^ *(\d+) +([\d.]+) %", table, re.MULTILINE)}
    assert found == pytest.approx(expected, abs=0.06)
    marked = re.search(r"^ *(\d+) .* most", table, re.MULTILINE)
    assert marked is not None
    assert int(marked[1]) == max(expected, key=lambda block: expected[block])


def test_the_uniform_share_counts_the_zeros_of_an_absent_t5(sd3, picture):
    shares, uniform = text_attention(sd3, np.asarray(Image.open(picture)), "house", 8, 0)
    assert shares.shape == (sd3.transformer.depth, sd3.transformer.config.num_attention_heads)
    assert uniform == pytest.approx(154 / ((SQUARE // 16) ** 2 + 154))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to analyze: --find-expert"),
        (["--find-expert", "--step", "29"], "step is 29"),
        (["--find-expert", "--seed", "-1"], "seed"),
    ],
)
def test_what_cannot_be_analyzed_is_told(sd3_checkpoint, picture, options, message, capsys):
    assert main(["analyze", picture, "house", "--model", str(sd3_checkpoint), *options]) == 1
    assert message in capsys.readouterr().err
