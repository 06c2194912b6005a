"""How fast JPEGs in records become training batches, compared with a plain loop and tf.data.

    python -m pytest tests/evidence/test_input_speed.py -m evidence

writes tests/evidence/input.md. tf.data is measured where it is installed: pip install tensorflow.
"""

import importlib.util
import os
import time
from typing import NamedTuple

import evidence_tables
import numpy as np
import photographs
import pytest

from curvax.training.data import array_records, convert, datasets, decode, encoded_images
from curvax.training.data.encoded_images import DecodeOptions

pytestmark = pytest.mark.evidence

SIDE, AREA, BATCH, IMAGES, EPOCHS = 224, (0.05, 1.0), 64, 256, 4


class Speed(NamedTuple):
    """Of one way to make batches."""

    wall: float  # images a second of the clock
    core: float  # images a second of a core's time, independent of other users


def measure(batches):
    """The speed of an iterator of batches, after its first epoch."""
    for _ in range(IMAGES // BATCH):
        next(batches)
    wall, core, count = time.perf_counter(), time.process_time(), 0
    for batch in batches:
        assert batch.shape == (BATCH, SIDE, SIDE, 3)
        count += len(batch)
    assert count >= IMAGES
    return Speed(count / (time.perf_counter() - wall), count / (time.process_time() - core))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEGs of 500×375 pixels, ImageNet's commonest size, and their records."""
    root = tmp_path_factory.mktemp("speed")
    rng = np.random.default_rng(0)
    for name, photograph in photographs.photographs().items():
        (root / "jpegs" / name).mkdir(parents=True)
        for i in range(-(-IMAGES // 3)):
            share = rng.uniform(0.6, 1)
            width, height = (int(share * n) for n in photograph.size)
            room = photograph.width - width, photograph.height - height
            left, top = rng.integers(0, room, endpoint=True)
            piece = photograph.crop((left, top, left + width, top + height)).resize((500, 375))
            (root / "jpegs" / name / f"{i}.jpg").write_bytes(photographs.jpeg(piece))
    convert.convert(convert.find_parts(root / "jpegs"), root / "records")
    return root / "records"


def ours(folder, threads):
    form = DecodeOptions(SIDE, 3, AREA, threads)
    split = encoded_images.whole(array_records.read_folder(folder).part("train"), form).rows(
        slice(IMAGES)
    )
    return (batch["input"] for batch in datasets.batches(split, BATCH, epochs=EPOCHS))


def plain(folder, crop):
    """A loop of one thread without records, epochs, seeds or labels."""
    shards = array_records.read_folder(folder).part("train")
    contents = [shards.read(number).image for number in range(IMAGES)]
    rng = np.random.default_rng(0)
    for _ in range(EPOCHS):
        for start in range(0, IMAGES, BATCH):
            yield np.stack([crop(c, SIDE, AREA, rng) for c in contents[start : start + BATCH]])


def tensorflow(folder, threads):
    """tf.data over the same JPEGs in memory, cropped and resized as TensorFlow's own models do."""
    import tensorflow as tf

    shards = array_records.read_folder(folder).part("train")
    contents = [shards.read(number).image for number in range(IMAGES)]

    def crop(content):
        corner, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(content),
            tf.zeros((1, 0, 4)),
            area_range=AREA,
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([corner[:2], size[:2]], axis=0)
        image = tf.image.decode_and_crop_jpeg(content, window, channels=3)
        return tf.cast(tf.image.resize(image, (SIDE, SIDE)), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(contents).shuffle(IMAGES).repeat(EPOCHS)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    batches = dataset.map(crop, num_parallel_calls=threads).batch(BATCH, drop_remainder=True)
    yield from batches.prefetch(2).with_options(options).as_numpy_iterator()


def test_input_costs_at_most_a_third_more_than_a_plain_loop(folder):
    cores = os.cpu_count()
    ways = {
        "curvax, 1 thread": ours(folder, 1),
        f"curvax, {cores} threads": ours(folder, cores),
        "the same decoding and cropping in a plain loop": plain(folder, decode.random_crop),
    }
    if importlib.util.find_spec("tensorflow"):
        ways |= {
            "tf.data, 1 thread": tensorflow(folder, 1),
            f"tf.data, {cores} threads": tensorflow(folder, cores),
        }
    speeds = {name: measure(batches) for name, batches in ways.items()}
    evidence_tables.write(
        "input",
        "JPEGs of 500×375 to training batches of 224×224",
        "Made by `python -m pytest tests/evidence/test_input_speed.py -m evidence` on "
        f"{cores} cores that others used too: images a second of a core's own time, and of the "
        "clock. Random crops of 5 to 100 % of the area, resized, bytes to the batch. "
        "curvax resizes with a filter that covers what a pixel covers, tf.data picks between "
        "neighbours and decodes the crop alone. A chip that trains on N images a second needs N "
        "divided by the first number in cores.",
        ["", "images / core second", "images / second"],
        [[name, f"{s.core:.0f}", f"{s.wall:.0f}"] for name, s in speeds.items()],
    )
    # records, seeds and threads cost little next to pixels; clocks differ by a quarter here
    plainly = speeds["the same decoding and cropping in a plain loop"]
    assert speeds["curvax, 1 thread"].core > 0.75 * plainly.core
