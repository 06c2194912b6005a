"""Records as `tf.train.Example` protocol buffers, read and written without TensorFlow.

The messages are those of tf_example.proto, which also says how tf_example_pb2.py is generated. The
names of the features are those of the `imagenet2012` that tensorflow-datasets writes: "image", the
encoded image; "label", an integer; "file_name".
"""

import os
from typing import NamedTuple

from google.protobuf.message import DecodeError

from curvax.training.data import tf_example_pb2
from curvax.training.data.archives import DataError


class Example(NamedTuple):
    """An encoded image with its label."""

    image: bytes  # JPEG, or another format that Pillow reads
    label: int
    name: str = ""  # of the original file


def encode(example: Example) -> bytes:
    """Serialises an example, deterministically."""
    message = tf_example_pb2.Example()
    feature = message.features.feature
    feature["image"].bytes_list.value.append(example.image)
    feature["label"].int64_list.value.append(example.label)
    feature["file_name"].bytes_list.value.append(os.fsencode(example.name))
    return message.SerializeToString(deterministic=True)


def decode(record: bytes) -> Example:
    """Parses a record; a missing "file_name" gives an empty name.

    Raises:
        DataError: the record is not a `tf.train.Example`, or lacks "image" or "label".
    """
    try:
        feature = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise DataError("it is not a `tf.train.Example`") from error
    names = feature["file_name"].bytes_list.value or [b""]
    try:
        (image,), (label,) = feature["image"].bytes_list.value, feature["label"].int64_list.value
    except ValueError as error:  # looking a feature up creates it, empty
        raise DataError("it has not one `image` and one `label`") from error
    return Example(image, label, names[0].decode(errors="replace"))
