"""Text is read as editors of every system save it; annotations are what they say, or refused by file and place."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

import pytest

from seg4diff_jax.data import text_files
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.folder import read_classes
from seg4diff_jax.data.image_captions import ImageCaptions, read_captions
from seg4diff_jax.data.text_files import Annotations, read_json, read_lines, read_text

NAMES = ["crème brûlée", "猫", "sofa\u2028bed", "form\x0cfeed"]
CODINGS = {
    "utf-8": b"",
    "utf-8 with a mark": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("end", ["", "end of line", "blank lines"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("coding", CODINGS)
def test_lines_are_the_same_however_an_editor_saves_them(tmp_path, coding, newline, end):
    ends = {"": "", "end of line": newline, "blank lines": newline + "  " + newline + newline}
    file = tmp_path / "classes.txt"
    file.write_bytes(CODINGS[coding] + (newline.join(NAMES) + ends[end]).encode(coding.split()[0]))
    assert read_lines(file, "names") == NAMES
    assert read_classes(file) == tuple(NAMES)


@pytest.mark.parametrize("coding", CODINGS)
def test_captions_are_the_same_however_an_editor_saves_them(tmp_path, coding):
    file = tmp_path / "captions.json"
    text = json.dumps({"sa_1": "A cat.", "2": "Crème."}, ensure_ascii=False, indent=1).replace("\n", "\r\n")
    file.write_bytes(CODINGS[coding] + text.encode(coding.split()[0]))
    assert read_captions(file) == {"1": "A cat.", "2": "Crème."}


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        ("cat\nsofa\ncr\xe8me\n".encode("latin-1"), "line 3: bytes that are no UTF-8"),
        ("cat\r\nsofa\r\ncr\xe8me\n".encode("latin-1"), "line 3: bytes that are no UTF-8"),
        ("cat\nsofa\n".encode("utf-16-le"), "line 1: a NUL character"),
        (b"cat\rso\0fa", "line 2: a NUL character"),
        (codecs.BOM_UTF16_LE + "cat\nsofa".encode("utf-16-le")[:-1], "line 2: bytes that are no UTF-16-LE"),
    ],
)
def test_what_is_no_text_is_refused_by_file_and_line(tmp_path, contents, problem):
    file = tmp_path / "classes.txt"
    file.write_bytes(contents)
    with pytest.raises(FolderError, match=rf"{re.escape(str(file))}, {problem}.*: expected class names.*save the fi"):
        read_classes(file)


def test_what_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(FolderError, match=r"absent\.txt: no such file; expected names"):
        read_text(tmp_path / "absent.txt", "names")
    with pytest.raises(FolderError, match=r"cannot be read: Is a directory; expected names"):
        read_text(tmp_path, "names")
    (tmp_path / "long.txt").write_text("cat\n" * 9)
    monkeypatch.setattr(text_files, "MOST_BYTES", 20)
    with pytest.raises(FolderError, match=r"long\.txt has 36 bytes; expected names in at most 20"):
        read_text(tmp_path / "long.txt", "names")


# ---- annotations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' occurs twice in one object"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "the number '1e999' is larger than any float"),
        ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ("[" * 200_000, "more than 64 objects or lists"),
    ],
)
def test_damaged_json_is_refused_in_one_sentence_that_names_the_file(tmp_path, contents, problem):
    file = tmp_path / "annotations.json"
    file.write_text(contents)
    with pytest.raises(FolderError, match=rf"annotations\.json: not JSON.*({problem}).*; expected a list$"):
        read_json(file, "a list")


def test_names_that_are_not_kept_are_let_go(tmp_path):
    (tmp_path / "a.json").write_text('{"a": {"b": 1, "c": [2]}, "c": 3}')
    assert read_json(tmp_path / "a.json", "", ("a", "b")) == {"a": {"b": 1}}


def found(value: object) -> Annotations:
    return Annotations({"images": [{}, {"id": value}]}, Path("set.json"), "images")["images"].each()[1]["id"]


def test_a_value_of_another_kind_is_refused_by_its_place():
    assert (found(3).whole(0, 3), found("a").text(), found(2.5).number(0)) == (3, "a", 2.5)
    for value in (True, 2.5, -1, 4, "3", None, [3], 10**400):
        with pytest.raises(FolderError, match=r"set\.json, images\[1\]\.id: .* whole number of 0 to 3 .*; expected im"):
            found(value).whole(0, 3)
    for value in (True, "3", None, -1, {}):
        with pytest.raises(FolderError, match=r"set\.json, images\[1\]\.id: .* where a number from 0 belongs"):
            found(value).number(0)
    with pytest.raises(FolderError, match=r"images\[1\]\.id: a list where text belongs"):
        found([]).text()
    with pytest.raises(FolderError, match=r"images\[1\]\.id: a text where a list belongs"):
        found("").each()
    with pytest.raises(FolderError, match=r"images\[1\]\.id: a list where an object belongs"):
        found([])["id"]
    with pytest.raises(FolderError, match=r"images\[1\]\.id: no 'name'"):
        found({})["name"]


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        ({"sa_1": "A cat.", "0001": "A dog."}, r"captions\.json, 0001: a second caption of the picture 1"),
        ({"1": 5}, r"captions\.json, 1: a number where text belongs"),
        ([], r"captions\.json: a list or a single value; expected a JSON object"),
        ({"annotations": [{"image_id": 1.5, "caption": "A cat."}]}, r"annotations\[0\]\.image_id: 1\.5 where a whole"),
        ({"annotations": [{"image_id": 1, "caption": None}]}, r"annotations\[0\]\.caption: a null where text"),
        (
            {"annotations": [{"image_id": n, "id": 7, "caption": ""} for n in (1, 2)]},
            r"annotations\[1\]: 7 a second time",
        ),
        (
            {"annotations": [{"image_id": 1, "id": [1], "caption": ""}]},
            r"annotations\[0\]\.id: a list where text or a whole number belongs",
        ),
        (
            {"annotations": [{"image_id": 1, "id": {}, "caption": ""}]},
            r"annotations\[0\]\.id: a table where text or a whole",
        ),
    ],
)
def test_captions_of_another_kind_or_twice_are_refused_by_their_place(tmp_path, contents, problem):
    (tmp_path / "captions.json").write_text(json.dumps(contents))
    with pytest.raises(FolderError, match=problem):
        read_captions(tmp_path / "captions.json")


def test_long_names_are_cut_in_messages(tmp_path):
    name, file = "x" * 10**5, tmp_path / "captions.json"
    twice = {f"0{'1' * 10**4}": "", "1" * 10**4: ""}
    for contents in ({name: 5}, {name: "A cat."}, twice, {"annotations": [{"image_id": name}]}):
        file.write_text(json.dumps(contents))
        with pytest.raises(FolderError, match="captions") as caught:
            ImageCaptions(("sa_1",), file)
        assert len(str(caught.value)) < 1000
