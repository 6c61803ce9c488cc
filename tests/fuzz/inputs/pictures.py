"""Pictures, label maps, and the data sets that are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seg4diff_jax.data.coco_categories import CATEGORIES
from seg4diff_jax.data.folder import LabelledFolder, read_classes
from seg4diff_jax.data.image_captions import ImageCaptions
from seg4diff_jax.data.labelled import read_values
from seg4diff_jax.data.sa1b import MaskFolder
from seg4diff_jax.data.sets import SETS
from seg4diff_jax.data.subset import listed_places
from seg4diff_jax.data.tfds_source import PreparedSet
from seg4diff_jax.images import read_image
from tests.fuzz.reader import Reader
from tests.reference.matlab_file import WORDS, some_records, write_matlab

SIZE = (12, 16)
NAMES = ("000000000001", "000000000002")
MODES = ("RGB", "RGBA", "L", "P", "LA")
PNGS = (*(f"{mode}.png" for mode in MODES), "deep.png")


def _picture(file: Path, seed: int, size: tuple[int, int] = SIZE) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(file)


def _label(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(file)


def drawn(seed: int, choices: list[int]) -> np.ndarray:
    return np.random.default_rng(seed).choice(choices, SIZE)


def _json(file: Path, tree: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree))


def make_pictures(root: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), np.uint8)
    for mode in MODES:
        Image.fromarray(pixels).convert(mode).save(root / f"{mode}.png")
    Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + pixels[..., 1]).save(root / "deep.png")


def make_photographs(root: Path) -> None:
    _picture(root / "photograph.jpg", 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", SIZE[::-1], 90).save(root / "turned.jpg", exif=exif)


def make_labels(root: Path) -> None:
    _label(root / "labels.png", drawn(0, [0, 1, 2, 255]))
    image = Image.fromarray(drawn(1, [0, 1, 2]).astype(np.uint8))
    image.putpalette([7] * 768)
    image.save(root / "palette.png")
    Image.fromarray(drawn(2, [0, 300, 65535]).astype(np.uint16)).save(root / "deep.png")


def each(read: Any, *names: str) -> Any:
    """What is read of every file."""
    return lambda root: {name: read(root / name) for name in names}


def items(source: Any) -> list[dict[str, Any]]:
    return [dict(source[index]) for index in range(len(source))]


def make_folder(root: Path) -> None:
    for number, name in enumerate(("a", "b")):
        _picture(root / "images" / f"{name}.png", number)
        _label(root / "labels" / f"{name}.png", drawn(number, [0, 1, 2, 255]))
    (root / "classes.txt").write_text("cat\ndog\ntraffic light\n")


def read_folder(root: Path) -> Any:
    source = LabelledFolder(root)
    return source.classes, items(source)


def make_stuff(root: Path) -> None:
    for number, name in enumerate(NAMES):
        _picture(root / "val2017" / f"{name}.jpg", number)
        _label(root / "stuffthingmaps/val2017" / f"{name}.png", drawn(number, [0, 91, 181, 255]))


def make_panoptic(root: Path) -> None:
    annotations = []
    for number, name in enumerate(NAMES):
        _picture(root / "val2017" / f"{name}.jpg", number)
        segments = drawn(number, [0, 7, 300, 70_000])
        _label(
            root / "annotations/panoptic_val2017" / f"{name}.png",
            np.stack([segments >> s & 255 for s in (0, 8, 16)], -1),
        )
        found = [{"id": i, "category_id": c, "area": 9, "iscrowd": 0} for i, c in ((7, 1), (300, 92), (70_000, 200))]
        annotations.append({"image_id": number + 1, "file_name": f"{name}.png", "segments_info": found})
    categories = [{"id": one.id, "name": one.name} for one in CATEGORIES[:3]]
    _json(root / "annotations/panoptic_val2017.json", {"annotations": annotations, "categories": categories})


def make_ade(root: Path) -> None:
    for number in range(2):
        name = f"ADE_val_{number + 1:08d}"
        _picture(root / "images/validation" / f"{name}.jpg", number)
        _label(root / "annotations/validation" / f"{name}.png", drawn(number, [0, 1, 150]))


def make_cityscapes(root: Path) -> None:
    for number in range(2):
        name = f"ulm/ulm_{number:06d}_000019"
        _picture(root / "leftImg8bit/val" / f"{name}_leftImg8bit.png", number)
        _label(root / "gtFine/val" / f"{name}_gtFine_labelIds.png", drawn(number, [0, 7, 33]))


def make_voc(root: Path, ids: tuple[int, ...] = (0, 1, 20, 255)) -> None:
    names = ("2007_000033", "2007_000042")
    for number, name in enumerate(names):
        _picture(root / "JPEGImages" / f"{name}.jpg", number)
        _label(root / "SegmentationClass" / f"{name}.png", drawn(number, [*ids]))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in names))


def make_context(root: Path) -> None:
    from pycocotools import mask as run_lengths

    images, masks = [], []
    for number in range(2):
        name = f"2008_{number:06d}"
        _picture(root / "JPEGImages" / f"{name}.jpg", number)
        about = {"image_id": number, "file_name": f"{name}.jpg", "phase": "val", "height": SIZE[0], "width": SIZE[1]}
        images.append(about)
        left = np.zeros(SIZE, np.uint8, order="F")
        left[:, : 5 + number] = 1
        encoded = run_lengths.encode(left)
        counts = encoded["counts"].decode()
        masks.append({"image_id": number, "category_id": 284, "segmentation": {"size": [*SIZE], "counts": counts}})
        ones = int(left.sum())
        plain = [ones, SIZE[0] * SIZE[1] - ones]
        masks.append({"image_id": number, "category_id": 354, "segmentation": {"size": [*SIZE], "counts": plain}})
    _json(root / "trainval_merged.json", {"images": images, "annos_segmentation": masks})


def make_sa1b(root: Path) -> None:
    from pycocotools import mask as run_lengths

    captions = {}
    for number in (1, 2):
        _picture(root / "pictures" / f"sa_{number}.jpg", number)
        found = []
        for width in (4, 9):
            left = np.zeros(SIZE, np.uint8, order="F")
            left[:, :width] = 1
            encoded = run_lengths.encode(left)
            counts = encoded["counts"].decode()
            mask = {"segmentation": {"size": [*SIZE], "counts": counts}, "area": int(left.sum()), "id": width}
            found.append(mask)
        _json(root / "pictures" / f"sa_{number}.json", {"image": {"image_id": number}, "annotations": found})
        captions[str(number)] = f"Picture {number}. A second sentence. A third."
    _json(root / "captions.json", captions)


def read_sa1b(root: Path) -> Any:
    found = items(MaskFolder(root / "pictures", root / "captions.json"))
    return [{**item, "masks": [item["masks"][index] for index in range(len(item["masks"]))]} for item in found]


def make_captions(root: Path) -> None:
    _json(root / "numbered.json", {"139": "A cat.", "285": "A dog on a sofa."})
    annotations = [{"image_id": 139, "id": 1, "caption": "A cat."}, {"image_id": 285, "id": 2, "caption": "A dog."}]
    _json(root / "coco.json", {"annotations": annotations})


def read_captions(file: Path) -> Any:
    return [ImageCaptions(("000000000139", "000000000285"), file)(name) for name in ("000000000139", "000000000285")]


def make_prepared(root: Path) -> None:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    labelled = tfds.features.LabeledImage(labels=["cat", "dog house"], shape=(None, None, 1))
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "segmentation": labelled})
    features.save_config(str(root))
    writer = ArrayRecordWriter(str(root / "tiny-validation.array_record-00000-of-00001"), "group_size:1")
    for number in range(3):
        pair = root / "image.png", root / "label.png"
        _picture(pair[0], number)
        _label(pair[1], drawn(number, [0, 1, 255]))
        example = tf_example_pb2.Example()
        for name, file in zip(("image", "segmentation"), pair, strict=True):
            example.features.feature[name].bytes_list.value.append(file.read_bytes())
            file.unlink()
        writer.write(example.SerializeToString())
    writer.close()
    split = {
        "name": "validation",
        "numBytes": "1",
        "shardLengths": ["3"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    _json(root / "dataset_info.json", info)


def read_prepared(root: Path) -> Any:
    source = PreparedSet(root)
    return source.classes, items(source)


def of_set(name: str) -> Any:
    def read(root: Path) -> Any:
        source = SETS[name].open(root)
        return source.split, source.kind, items(source)

    return read


def make_matlab(root: Path) -> None:
    write_matlab(root / "gtsegs_ijcv.mat", some_records(SIZE, SIZE[::-1]))
    (root / "words.txt").write_text(WORDS)


def make_objects(root: Path) -> None:
    for number, name in enumerate(NAMES):
        _picture(root / f"images/{name}.jpg", number)
        _label(root / f"masks/{name}.png", drawn(number, [0, 1, 255]))
    (root / "names.txt").write_text("".join(f"{name}\tgarden spider\n" for name in NAMES))


LABELLED = "seg4diff_jax/data/labelled.py"
PICTURES = {"**/*.jpg": "jpeg", "**/*.png": "png"}
COUNTED = {r"\.(jpg|png): (absent|dangling|directory): ": "a set that finds its images by a pattern has one fewer"}

READERS: dict[str, Reader] = {
    "png": Reader(make_pictures, each(read_image, *PNGS), ("seg4diff_jax/images.py",), {"*": "png"}, cases=14),
    "jpeg": Reader(
        make_photographs,
        each(read_image, "photograph.jpg", "turned.jpg"),
        ("seg4diff_jax/images.py",),
        {"*": "jpeg"},
        cases=8,
    ),
    "label map": Reader(
        make_labels,
        each(read_values, "labels.png", "palette.png", "deep.png"),
        (LABELLED, "seg4diff_jax/image_files.py"),
        {"*": "png"},
        cases=14,
    ),
    "class list": Reader(
        lambda root: (root / "classes.txt").write_text("cat\ndog\ntraffic light\n"),
        lambda root: read_classes(root / "classes.txt"),
        ("seg4diff_jax/data/folder.py",),
        {"*": "text"},
        cases=8,
    ),
    "list of images": Reader(
        lambda root: (root / "list.txt").write_text("second\nimages/first.jpg\n"),
        lambda root: listed_places(root / "list.txt", ["first", "second", "third"], "a set"),
        ("seg4diff_jax/data/subset.py",),
        {"*": "text"},
        cases=6,
    ),
    "folder": Reader(
        make_folder,
        read_folder,
        ("seg4diff_jax/data/folder.py",),
        {"classes.txt": "text", "images/*": "png", "labels/*": "png"},
        {"images/.*: (absent|directory): ": "it has one image fewer"},
        cases=14,
    ),
    "coco stuffthingmaps": Reader(
        make_stuff, of_set("coco-171"), ("seg4diff_jax/data/coco.py",), PICTURES, COUNTED, cases=8
    ),
    "coco panoptic": Reader(
        make_panoptic,
        of_set("coco-171"),
        ("seg4diff_jax/data/coco.py",),
        {"annotations/*/*.png": "png", "annotations/*.json": "json"},
        cases=20,
    ),
    "voc": Reader(
        make_voc,
        of_set("voc20"),
        ("seg4diff_jax/data/voc.py",),
        PICTURES | {"ImageSets/Segmentation/*": "text"},
        cases=8,
    ),
    "voc of one class": Reader(
        lambda root: make_voc(root, (0, 20, 255)),
        of_set("voc-single"),
        ("seg4diff_jax/data/voc_single.py",),
        PICTURES | {"ImageSets/Segmentation/*": "text"},
        cases=6,
    ),
    "matlab": Reader(
        make_matlab,
        of_set("imagenet-segmentation"),
        ("seg4diff_jax/data/imagenet_segmentation.py",),
        {"*.mat": "hdf5", "words.txt": "text"},
        cases=20,
    ),
    "objects": Reader(
        make_objects,
        of_set("imagenet-segmentation"),
        ("seg4diff_jax/data/imagenet_segmentation.py",),
        PICTURES | {"names.txt": "text"},
        cases=10,
    ),
    "context": Reader(
        make_context,
        of_set("context59"),
        ("seg4diff_jax/data/pascal_context.py",),
        {"trainval_merged.json": "json"},
        {
            r": zero: .*category_id": "what nobody labelled",
            r": (zero|negative|huge): .*image_id": "of another picture",
        },
        cases=20,
    ),
    "ade20k": Reader(make_ade, of_set("ade20k150"), ("seg4diff_jax/data/ade20k.py",), PICTURES, COUNTED, cases=6),
    "cityscapes": Reader(
        make_cityscapes,
        of_set("cityscapes19"),
        ("seg4diff_jax/data/cityscapes.py",),
        {"**/*.png": "png"},
        COUNTED,
        cases=6,
    ),
    "sa-1b": Reader(
        make_sa1b,
        read_sa1b,
        ("seg4diff_jax/data/sa1b.py",),
        {"pictures/*.json": "json", "captions.json": "json", "pictures/*.jpg": "jpeg"},
        {
            r"pictures.*: (zero|deleted|negative|fraction|huge): .*(area|all of it)": "another order, or no mask",
            r"captions.json: (deleted|long): ": "another caption, or none",
            r"pictures/.*.jpg: absent": "it has one picture fewer",
        },
        cases=20,
    ),
    "captions": Reader(
        make_captions,
        each(read_captions, "numbered.json", "coco.json"),
        ("seg4diff_jax/data/image_captions.py", "seg4diff_jax/data/text_files.py"),
        {"*": "json"},
        {
            r": (swap|long|deleted|zero|negative|huge): ": "another caption, or none",
            r'image_id = "text"': "pictures may have names in place of numbers",
        },
        cases=12,
    ),
    "prepared set": Reader(
        make_prepared,
        read_prepared,
        ("seg4diff_jax/data/tfds_source.py",),
        {"*.json": "json", "*.array_record*": "summed"},
        cases=16,
    ),
}
