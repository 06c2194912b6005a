"""ImageNet-ReaL: a set of correct labels for each image of ImageNet's validation set.

Beyer et al., arXiv:2006.07159.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from curvax.training.data.archives import DataError
from curvax.training.data.encoded_images import EncodedImages
from curvax.training.evaluation.test_sets import EvalSet

_VALIDATION = re.compile(r".*_val_(\d+)\.\w+")


def with_labels(eval_set: EvalSet, path: Path) -> EvalSet:
    """An evaluation set with ImageNet-ReaL's labels; images without a correct label are left out.

    Args:
        eval_set: images with the names of ImageNet's, ILSVRC2012_val_00000001.JPEG.
        path: a JSON list of label lists; the number in an image's name, from 1, is the index.

    Raises:
        DataError: the file is no such list, the name of an image has no number in the list, or no
            image has a correct label.
    """
    sets = _read_sets(path, len(eval_set.among))
    if not isinstance(eval_set.examples, EncodedImages):
        raise DataError(
            "`--labels` are found by the names of image files, and the images of this run have "
            "none. Give ImageNet's validation images, or their records, with `--data`."
        )
    store, chosen = eval_set.examples.store, eval_set.examples.chosen
    right = [_set_of(store.read(number).name, sets, path) for number in chosen.tolist()]
    kept = np.array([bool(labels) for labels in right])
    if not kept.any():
        raise DataError(
            f"Images without a correct label are left out, and {path} gives none to any image of "
            f"`{eval_set.name}`. Give the labels of its images, or leave out `--labels`."
        )
    return eval_set._replace(
        name=f"{eval_set.name}, {path.name}",
        examples=eval_set.examples.rows(kept),
        right=[labels for labels in right if labels],
    )


def _read_sets(path: Path, classes: int) -> list[list[int]]:
    try:
        sets = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"The labels {path} cannot be read: {error}.") from error
    valid = isinstance(sets, list) and all(
        isinstance(each, list) and all(label in range(classes) for label in each) for each in sets
    )
    if not valid:
        raise DataError(
            f"The labels {path} are not a list of lists of classes from 0 to {classes - 1}, as "
            "`real.json` of ImageNet-ReaL is."
        )
    return sets


def _set_of(name: str, sets: Sequence[Sequence[int]], path: Path) -> Sequence[int]:
    match = _VALIDATION.fullmatch(name)
    if match is None or not 0 < int(match[1]) <= len(sets):
        raise DataError(
            f"The image `{name}` has no number among the {len(sets)} of {path}: names are as "
            "ILSVRC2012_val_00000001.JPEG. Give ImageNet's validation images with `--data`."
        )
    return sets[int(match[1]) - 1]
