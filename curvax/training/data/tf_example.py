"""Records as `tf.train.Example` protocol buffers, read and written without TensorFlow.

    message Bytes { repeated bytes value = 1; }
    message Feature { oneof kind { Bytes bytes_list = 1; Int64s int64_list = 3; } }
    message Features { map<string, Feature> feature = 1; }
    message Example { Features features = 1; }

The names of the features are those of the `imagenet2012` that tensorflow-datasets writes: "image",
the encoded image; "label", an integer; "file_name".
"""

import os
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from curvax.training.data.archives import DataError

_PACKAGE = "curvax.tf_example"


class Example(NamedTuple):
    """An encoded image with its label."""

    image: bytes  # JPEG, or another format that Pillow reads
    label: int
    name: str = ""  # of the original file


def _message_types() -> Any:
    """The message class `Example`, without the fields that are not read here."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="curvax_records.proto", package=_PACKAGE, syntax="proto3"
    )

    def field(message: Any, name: str, number: int, of: Any, **options: Any) -> Any:
        options = {"label": kind.LABEL_OPTIONAL} | options
        if isinstance(of, str):
            options |= {"type_name": f".{_PACKAGE}.{of}"}
            of = kind.TYPE_MESSAGE
        return message.field.add(name=name, number=number, type=of, **options)

    for name, of in (("Bytes", kind.TYPE_BYTES), ("Int64s", kind.TYPE_INT64)):
        field(file.message_type.add(name=name), "value", 1, of, label=kind.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    field(feature, "bytes_list", 1, "Bytes", oneof_index=0)
    field(feature, "int64_list", 3, "Int64s", oneof_index=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    field(entry, "key", 1, kind.TYPE_STRING)
    field(entry, "value", 2, "Feature")
    field(features, "feature", 1, "Features.FeatureEntry", label=kind.LABEL_REPEATED)
    field(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


_Message = _message_types()


def encode(example: Example) -> bytes:
    """Serialises an example, deterministically."""
    message = _Message()
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
        feature = _Message.FromString(record).features.feature
    except DecodeError as error:
        raise DataError("it is not a `tf.train.Example`") from error
    names = feature["file_name"].bytes_list.value or [b""]
    try:
        (image,), (label,) = feature["image"].bytes_list.value, feature["label"].int64_list.value
    except ValueError as error:  # looking a feature up creates it, empty
        raise DataError("it has not one `image` and one `label`") from error
    return Example(image, label, names[0].decode(errors="replace"))
