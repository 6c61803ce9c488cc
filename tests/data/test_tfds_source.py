"""Sets that tensorflow-datasets has prepared, read without TensorFlow."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.tfds_source import PreparedSet
from seg4diff_jax.images import ImageError

tfds: Any = pytest.importorskip("tensorflow_datasets")

LABELS = np.array([[0, 1, 255], [1, 0, 0]], np.uint8)
GRAY = 120


def png(values: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def jpeg(size: tuple[int, int] = (2, 3), mode: str = "RGB") -> bytes:
    file = BytesIO()
    Image.new(mode, size[::-1], {"L": GRAY, "RGB": (GRAY,) * 3, "CMYK": (0, 0, 0, 255 - GRAY)}[mode]).save(file, "JPEG")
    return file.getvalue()


def prepare(directory: Path, features: Mapping[str, Any], splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """What `download_and_prepare` leaves: records are serialized tf.train.Examples."""
    from tensorflow_datasets.proto import tf_example_pb2

    directory.mkdir(parents=True)
    tfds.features.FeaturesDict(features).save_config(str(directory))
    listing = []
    for split, records in splits.items():
        writer = ArrayRecordWriter(str(directory / f"tiny-{split}.array_record-00000-of-00001"), "group_size:1")
        for record in records:
            example = tf_example_pb2.Example()
            for name, value in record.items():
                if isinstance(value, bytes):
                    example.features.feature[name].bytes_list.value.append(value)
                else:
                    example.features.feature[name].int64_list.value.extend(np.asarray(value).reshape(-1).tolist())
            writer.write(example.SerializeToString())
        writer.close()
        listing.append(
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(len(records))],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": listing}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    return directory


def image_and(**features: Any) -> dict[str, Any]:
    return {"image": tfds.features.Image(), **features}


@pytest.fixture
def root(tmp_path) -> Path:
    features = image_and(
        segmentation=tfds.features.LabeledImage(labels=["cat", "dog house"]), file_name=tfds.features.Text()
    )
    record = {"image": jpeg(), "segmentation": png(LABELS), "file_name": b"x"}
    splits = {"train": [record] * 3, "validation": [record, {**record, "segmentation": png(LABELS[:, ::-1])}]}
    prepare(tmp_path / "tiny" / "1.0.0", features, splits)
    return tmp_path


def test_items_are_image_labels_and_name_with_the_classes_that_the_set_names(root):
    source = PreparedSet(root)
    assert (len(source), source.split, source.kind, source.name) == (2, "validation", "segmentation", "tiny")
    assert source.classes == ("cat", "dog house")
    np.testing.assert_array_equal(source[0]["labels"], LABELS)
    np.testing.assert_array_equal(source[1]["labels"], LABELS[:, ::-1])
    assert source[0]["labels"].dtype == np.uint8
    np.testing.assert_array_equal(source[0]["image"], np.full((2, 3, 3), GRAY, np.uint8))
    assert [source[index]["name"] for index in range(2)] == ["validation-000000", "validation-000001"]
    assert len(PreparedSet(root / "tiny" / "1.0.0", "training")) == 3


def test_workers_get_copies(root):
    source = PreparedSet(root)
    assert source[0]["name"] == "validation-000000"
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[1]["labels"], LABELS[:, ::-1])


def test_no_tensorflow_is_imported(root):
    code = f"""
import sys
from seg4diff_jax.data.tfds_source import PreparedSet
print(PreparedSet({str(root)!r})[1]["labels"].tolist(), "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == f"{LABELS[:, ::-1].tolist()} False", done.stderr


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_pictures_are_read_as_rgb(tmp_path, mode):
    features = image_and(mask=tfds.features.LabeledImage(labels=["cat", "dog"]))
    prepare(tmp_path / "set", features, {"test": [{"image": jpeg(mode=mode), "mask": png(LABELS)}]})
    image = PreparedSet(tmp_path / "set")[0]["image"]
    assert image.shape == (2, 3, 3)
    assert np.abs(image.astype(int) - GRAY).max() <= 2


def test_labels_may_be_arrays_and_class_names_lie_beside_a_set_without_any(tmp_path):
    features = image_and(mask=tfds.features.Tensor(shape=(2, 3, 1), dtype=np.int32))
    root = prepare(tmp_path / "set", features, {"test": [{"image": jpeg(), "mask": LABELS}]})
    with pytest.raises(FolderError, match=r"classes\.txt: no such file; expected class names"):
        PreparedSet(root)
    (root / "classes.txt").write_text("cat\ndog\n")
    source = PreparedSet(root)
    assert source.classes == ("cat", "dog")
    np.testing.assert_array_equal(source[0]["labels"], LABELS)


def test_of_several_label_maps_one_is_to_be_chosen(tmp_path):
    features = image_and(
        coarse=tfds.features.Image(shape=(None, None, 1)), fine=tfds.features.LabeledImage(labels=["a", "b"])
    )
    record = {"image": jpeg(), "coarse": png(np.zeros((2, 3), np.uint8)), "fine": png(LABELS)}
    root = prepare(tmp_path / "set", features, {"test": [record]})
    with pytest.raises(FolderError, match=r"2 fields with a label map.*choose one of coarse, fine by --data\.labels"):
        PreparedSet(root)
    np.testing.assert_array_equal(PreparedSet(root, kind="fine")[0]["labels"], LABELS)
    with pytest.raises(ValueError, match=r"data\.labels is 'id': .*set has coarse and fine"):
        PreparedSet(root, kind="id")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"segmentation": png(LABELS + 1)}, r"validation-000000, segmentation: 2 pixels .* 2; the set names 2 classes"),
        ({"image": jpeg((4, 4))}, r"segmentation is 2 x 3 pixels and its image 4 x 4"),
        ({"image": b"no image"}, r"validation-000000, image: cannot be read as an image"),
        ({"segmentation": b"no label"}, r"validation-000000, segmentation: cannot be read as an image"),
    ],
)
def test_an_item_that_cannot_be_used_is_named(tmp_path, record, message):
    features = image_and(segmentation=tfds.features.LabeledImage(labels=["cat", "dog"]))
    record = {"image": jpeg(), "segmentation": png(LABELS), **record}
    source = PreparedSet(prepare(tmp_path / "set", features, {"validation": [record]}))
    with pytest.raises((FolderError, ImageError), match=message):
        source[0]


def test_what_is_not_prepared_is_refused(root, tmp_path):
    with pytest.raises(FolderError, match=r"absent: no such directory; expected a set that tensorflow-datasets"):
        PreparedSet(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FolderError, match=r"empty holds no dataset_info\.json; expected a set"):
        PreparedSet(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"data\.split is 'test': tiny has train, validation"):
        PreparedSet(root, "test")
    features = image_and(bounding_box=tfds.features.Text())
    boxes = prepare(tmp_path / "boxes", features, {"test": []})
    with pytest.raises(FolderError, match=r"0 fields with a label map.*bounding_box \(Text\), image \(Image\)"):
        PreparedSet(boxes)
    with pytest.raises(FolderError, match=r"holds several prepared sets: .*boxes, .*1\.0\.0; give one of them"):
        PreparedSet(tmp_path)
    info = json.loads((root / "tiny/1.0.0/dataset_info.json").read_text())
    (root / "tiny/1.0.0/dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(FolderError, match=r"is not a set that .*array_record'"):
        PreparedSet(root / "tiny")
    (root / "tiny/1.0.0/dataset_info.json").write_text("{")
    with pytest.raises(FolderError, match=r"1\.0\.0 cannot be read"):
        PreparedSet(root / "tiny")
