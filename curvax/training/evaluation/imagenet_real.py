"""ImageNet-ReaL: for each of ImageNet's validation pictures a set of labels, any of which is right.

Beyer et al., arXiv:2006.07159.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from curvax.training.data.archives import DataError
from curvax.training.data.encoded_images import Pictures
from curvax.training.evaluation.test_sets import Benchmark

_VALIDATION = re.compile(r".*_val_(\d+)\.\w+")


def with_labels(benchmark: Benchmark, path: Path) -> Benchmark:
    """The benchmark with ImageNet-ReaL's labels: any of a set is right, empty sets are left out.

    The file is a list of sets by the number, from 1, in the names
    of ImageNet's validation pictures, ILSVRC2012_val_00000001.JPEG.

    Raises:
        DataError: the file is none, a picture's name has no number of its, or no picture has a
            right label.
    """
    sets = _read_sets(path, len(benchmark.among))
    if not isinstance(benchmark.examples, Pictures):
        raise DataError(
            "`--labels` go by the names of pictures, and the images of this run have none. Give "
            "ImageNet's validation pictures, or their records, with `--data`."
        )
    store, chosen = benchmark.examples.store, benchmark.examples.chosen
    right = [_set_of(store.read(number).name, sets, path) for number in chosen.tolist()]
    kept = np.array([bool(labels) for labels in right])
    if not kept.any():
        raise DataError(
            f"Pictures without a right label are left out, and {path} gives none to any picture of "
            f"`{benchmark.name}`. Give the labels of its pictures, or leave out `--labels`."
        )
    return benchmark._replace(
        name=f"{benchmark.name}, {path.name}",
        examples=benchmark.examples.rows(kept),
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
            f"The picture `{name}` has no number among the {len(sets)} of {path}: names are as "
            "ILSVRC2012_val_00000001.JPEG. Give ImageNet's validation pictures with `--data`."
        )
    return sets[int(match[1]) - 1]
