"""What `evaluate.py --help` says of each option."""

from __future__ import annotations

HELP = {
    "model": "miniature, a directory, a single file, or a Hub id",
    "lora": "adapters for the transformer: a file or directory of any format that `seg4diff convert lora` reads",
    "protocol": (
        "open_vocabulary: classes by their names; unsupervised: segments without names, matched with classes; "
        "open_vocabulary,unsupervised: both, reported apart"
    ),
    "data.name": (
        "voc20, voc21, context59, context60, coco-object, coco-stuff27, coco-171, ade20k150, cityscapes19, "
        "cityscapes27, imagenet-segmentation, voc-single, tfds, folder or scenes; default: folder if there is a "
        "--data.root, else scenes, which are synthetic"
    ),
    "data.root": "directory with the set as it is handed out; of a folder: with images/, labels/ and classes.txt",
    "data.split": "part of the set; default: the one that results are reported on",
    "data.labels": (
        "which labels, where a set has several: SegmentationClass or SegmentationClassAug, stuffthingmaps or panoptic, "
        "labelIds or labelTrainIds; of tfds the field; default: the first that is there"
    ),
    "data.names": (
        "how prompts spell classes: own, as the set does; readable, `dining table`, without suffixes; release, cut at "
        "the first '-'"
    ),
    "data.synonyms": (
        "a YAML file with names of classes, as in `sofa: [sofa, couch]`: prompts have them in place of the class's "
        "own, and its score is the mean over them"
    ),
    "data.template": "text around each name in prompts, as in `a photo of {}`; scores are read from the names alone",
    "data.stop_words": "words at the end of each prompt, as in the,of: they draw attention away, and win no pixel",
    "data.background": (
        "of voc21, context60, coco-object, and a folder with a class `background`: scored as a class, ignored, or "
        "asked for without being scored, as the release does with coco-object; default: the set's rule"
    ),
    "data.unlabelled": (
        "what pixels of coco-object are that nobody labelled: background, as others convert it (default), or ignored"
    ),
    "data.list": "a file with names of images, one a line: these alone are read, in its order",
    "data.resize": (
        "how images come to the size that the model sees: square, straight to it, antialiased; release, as the release "
        "does it, by way of a shorter side of 640 pixels; aspect, to as many pixels in the nearest of 11 common aspects"
        "; paper, the square in the middle alone: what is cut off is not scored, and reported"
    ),
    "data.scenes": "how many synthetic scenes; they are written to the user's cache if they are not there",
    "blocks": "expert (the checkpoint's own), all, 9, 2,5,9 or 0..23: all come from one pass",
    "heads": "whose attention is read: mean (of all heads), all (each by itself), 3, 0..5 or mean,all",
    "steps": "expert (the checkpoint's own), 8, 2,4,8 or all of 1 (nearly clean) to 28 (pure noise); a pass each",
    "seeds": "of the noise; a pass each, averaged in the tables",
    "prompts": (
        "present: each image is asked for the classes that it has, as in the paper; all: for the whole vocabulary; "
        "decoys: for its own and some that it has not, at random; lookalikes: for its own and those most like them; "
        "present,all: both, reported apart"
    ),
    "background.threshold": (
        "pixels whose classes all score less, 0 to 1, are background; 0.01,0.02 scores each, grid 24 of 0.0002..0.58; "
        "its name is then not asked for; of imagenet-segmentation and voc-single also mean, of each map; default: none"
    ),
    "background.competitors": (
        "words that are asked for beside the classes, as in sky,wall,ground: their pixels are background, whose name "
        "is then asked for only if it is one of them"
    ),
    "decoys.count": "how many classes that it has not an image is asked for, with --prompts decoys or lookalikes",
    "decoys.seed": "of decoys at random: an image has the same ones whatever the noise",
    "metrics": (
        "figures beside mIoU, or all; presence: how well maps tell which classes are there, for prompts that name "
        "absent ones; boundary: IoU of what lies near the edges of masks; pointing: how often a map's highest point "
        "lies on its class; average_precision (not in all): mAP of imagenet-segmentation and voc-single; default: none"
    ),
    "unsupervised.grouping": (
        "what makes segments: pads, maps of an empty prompt's tokens, as in the paper; diffseg, maps of image-to-image "
        "attention; diffcut, cuts between features"
    ),
    "unsupervised.threshold": (
        "maps merge whose divergence is below it, and diffcut cuts where a cut costs less; 0.035,0.1 scores both, "
        "grid many: for pads 23 of 0.0001..0.2; default: the one of the grouping, and of the minmax"
    ),
    "unsupervised.minmax": "what maps of pads are brought to 0..1 over: pixel, their pixels; token, as in the release",
    "unsupervised.match": "what is matched by itself: image; row of pixels, as in the release, which scores higher",
    "unsupervised.absent_classes": "classes that are not there take part in the match, as in the release",
    "masks.views": "how often each image is noised for masks by name; the maps are averaged",
    "masks.mirrored": "every second view sees the mirrored latents",
    "masks.levels": "noise levels of the views in turn, as in [2,3]; default: all at the level that --steps has",
    "masks.reading": (
        "where class words stand: prompt, in the text that images read; concepts, in tokens that read images and that "
        "nothing reads; concept outputs, the likeness of their attention's outputs"
    ),
    "masks.normalize": (
        "of class maps: none; content, in parts of what all class words get; minmax, each from 0 to 1 over its image"
    ),
    "masks.balance": "0 to 1: each class's map is divided by its mean over the image to this power",
    "masks.prior": "0 to 1: each class's map is divided by its mean in --class-prior to this power",
    "masks.rounds": "how often class maps are averaged over image tokens that attend to each other",
    "masks.sharpness": "factor of the queries in that attention; above 1 only the most alike are averaged",
    "masks.refine_block": "the block whose image-to-image attention it is; default: the one that is read",
    "masks.refine_heads": "its heads, as in [0,2,3]; default: all",
    "masks.edge_radius": (
        "radius, in image tokens, of the windows in which scores follow the edges of the image; 0: they do not"
    ),
    "masks.edge_smoothing": "variance of pixels (0 to 1) below which a window has no edges",
    "masks.edge_rounds": (
        "how often scores are averaged over pixels of like colour (PAMR), instead of --masks.edge-radius; 0: never"
    ),
    "class_prior": "what seg4diff class-prior wrote: how much attention each class's words draw anywhere",
    "batch_size": (
        "images, and prompts, at a time, over all devices of a process; default: on each as many as have 16384 image "
        "tokens, and no more than the set has"
    ),
    "dtype": "of parameters and computation; default: float32 on a CPU, else bfloat16",
    "skip_unreadable": "leave out images that cannot be read or have no usable label, and say so",
    "pictures": "images on the page: the best, the worst and some at random",
    "out": "directory for results; default: runs/evaluate/TIME",
    "overwrite": "replace the results of an earlier run in --out",
    "resume": "go on with the interrupted run in --out, if there is one",
    "shard_batches": "batches after which what was counted is saved, for --resume",
    "distributed": (
        "this is one process of several: they find each other through the cluster, or through "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    ),
    "name_expert": "write the best block and noise level into the checkpoint's configuration, as its own from then on",
}
