"""Conversion of class folders to array_record files: contents, order and errors."""

import collections
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import photographs
import pytest

from curvax.cli import main
from curvax.training.data import array_records, convert, image_folders, tf_example, tf_example_pb2
from curvax.training.data.archives import DataError
from curvax.training.data.array_records import Shards, read_folder
from curvax.training.data.convert import find_parts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder as ImageNet's: `train` with 12 images of each class, `val` with 3."""
    return photographs.write_parts(tmp_path_factory.mktemp("pictures"), 12, 3)


@pytest.fixture
def own(source, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(source, tmp_path / "own")


def every(shards):
    return [shards.read(number) for number in range(shards.size)]


def test_every_image_becomes_a_record_with_bytes_label_and_name(source, tmp_path):
    summary = convert.convert(find_parts(source), tmp_path / "out")
    assert summary.counts == {"train": (36, 1), "validation": (9, 1)}
    folder = read_folder(tmp_path / "out")
    assert folder.names == list(photographs.CLASSES)
    for part, inside in (("train", "train"), ("validation", "val")):
        for example in every(folder.part(part)):
            name = folder.names[example.label]
            assert example.name.startswith(name)
            assert example.image == (source / inside / name / example.name).read_bytes()
    names = [example.name for example in every(folder.part("train"))]
    assert len(set(names)) == 36


def test_records_are_shuffled_deterministically(source, tmp_path):
    for name in ("one", "two"):
        convert.convert(find_parts(source), tmp_path / name)
    one, two = (
        [example.label for example in every(read_folder(tmp_path / name).part("train"))]
        for name in ("one", "two")
    )
    assert one == two
    assert one != sorted(one)
    assert max(map(len, "".join(map(str, one)).split("1"))) < 12  # no class stays together


def test_large_parts_are_several_files_named_as_by_tfds(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_SHARD", 30_000)
    convert.convert(find_parts(source), tmp_path / "my-pictures")
    files = sorted(path.name for path in (tmp_path / "my-pictures").glob("*train*"))
    assert len(files) > 2
    assert files[1] == f"my_pictures-train.array_record-00001-of-{len(files):05}"
    names = [e.name for e in every(read_folder(tmp_path / "my-pictures").part("train"))]
    assert len(set(names)) == 36


def test_find_parts_finds_train_and_validation_folders(source, tmp_path):
    assert find_parts(source)["validation"].root == source / "val"
    assert set(find_parts(source / "val")) == {"train"}
    other = photographs.write_class_folders(tmp_path / "other", 1)
    assert find_parts(source, other)["validation"].root == other


def test_undecodable_images_are_listed_by_path_and_nothing_is_kept(own, tmp_path):
    cut, text = own / "train/bloom/bloom_3.JPEG", own / "val/temple/temple_0.JPEG"
    cut.write_bytes(cut.read_bytes()[:900])
    text.write_text("moved")
    with pytest.raises(DataError, match=r"2 images cannot be decoded.*`--skip`") as error:
        convert.convert(find_parts(own), tmp_path / "out")
    assert f"{cut}: it cannot be decoded: image file is truncated" in str(error.value)
    assert f"{text}: it cannot be decoded: Pillow does not know" in str(error.value)
    assert list(tmp_path.iterdir()) == [own]


def test_skip_leaves_out_undecodable_images(own, tmp_path, capsys):
    (own / "train/bloom/bloom_3.JPEG").write_bytes(b"")
    assert main.main(["convert", str(own), str(tmp_path / "out"), "--skip"]) == 0
    printed = capsys.readouterr().out
    assert "train: 35 images in 1 file\n" in printed
    assert "1 image left out:" in printed
    assert f"{own}/train/bloom/bloom_3.JPEG" in printed
    labels = [example.label for example in every(read_folder(tmp_path / "out").part("train"))]
    assert collections.Counter(labels) == {0: 11, 1: 12, 2: 12}


@pytest.mark.parametrize(
    ("options", "words"),
    [([], "9 images cannot be decoded"), (["--skip"], "No image of `validation`")],
)
def test_part_of_empty_files_is_refused(own, tmp_path, capsys, options, words):
    for path in (own / "val").rglob("*.JPEG"):
        path.write_bytes(b"")
    assert main.main(["convert", str(own), str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interrupted_conversion_leaves_no_files(source, tmp_path):
    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(find_parts(source), tmp_path / "out", report=stop)
    assert not any(tmp_path.iterdir())


def test_remains_of_a_killed_conversion_are_replaced(source, tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "out-train.array_record-00000-of-00001").write_bytes(b"half")
    convert.convert(find_parts(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_raises_before_and_while_writing(source, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=10**6)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"needs \d+ bytes and 1000000 are free.*Make room"):
        convert.convert(find_parts(source), tmp_path / "out")
    usage.free = 10**12
    monkeypatch.setattr(array_records, "shard_name", lambda *_: "/dev/full")
    with pytest.raises(DataError, match=r"No space left on device.*nothing was kept"):
        convert.convert(find_parts(source), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_existing_output_folder_is_refused_and_unchanged(source, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(DataError, match="already exists"):
        convert.convert(find_parts(source), tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_stray_files_are_skipped_and_stray_images_refused(own, tmp_path):
    (own / "train/README.txt").write_text("about")
    (own / "train/bloom/notes.txt").write_text("about")
    (own / "train/.DS_Store").write_text("")
    summary = convert.convert(find_parts(own), tmp_path / "out")
    assert [path.name for path in summary.aside] == ["README.txt", "notes.txt"]
    assert "README.txt" in convert.as_text(summary)
    shutil.copy(own / "train/bloom/bloom_0.JPEG", own / "train/loose.jpg")
    with pytest.raises(DataError, match=r"outside of these it has `loose\.jpg`\. Move"):
        image_folders.listing(own / "train")


def test_missing_and_empty_folders_are_refused(own, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_parts(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"bloom_0\.JPEG is not a folder of class.* it is a file"):
        find_parts(own / "train/bloom/bloom_0.JPEG")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no class folders.*ROOT/CLASS/image.jpg"):
        find_parts(tmp_path / "empty")
    (own / "train/void").mkdir()
    with pytest.raises(DataError, match=r"class folder \S+/train/void holds no images"):
        find_parts(own)


def test_class_in_the_validation_part_alone_is_refused(own, tmp_path):
    (own / "val/bloom").rename(own / "val/blossom")
    with pytest.raises(DataError, match=r"`blossom`.*3 classes, `bloom`, `hopper`, `temple`\."):
        convert.convert(find_parts(own), tmp_path / "out")


# Records, as they are read


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    convert.convert(find_parts(source), out)
    return out


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "copy")


def test_truncated_record_file_raises(copy):
    file = copy / "out-train.array_record-00000-of-00001"
    file.write_bytes(file.read_bytes()[:-70_000])
    with pytest.raises(DataError, match=r"out-train\S+-of-00001 cannot be read.*truncated"):
        read_folder(copy).part("train")
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"at least 64KB.*truncated"):
        read_folder(copy).part("train")


def test_damaged_record_file_raises(copy):
    file = copy / "out-train.array_record-00000-of-00001"
    content = bytearray(file.read_bytes())
    content[30_000:31_000] = bytes(1000)
    file.write_bytes(content)
    shards = read_folder(copy).part("train")
    assert shards.size == 36
    with pytest.raises(DataError, match=r"out-train\S+ cannot be read \(Corrupted"):
        every(shards)


def test_missing_and_foreign_record_files_raise(copy, tmp_path):
    train = copy / "out-train.array_record-00000-of-00001"
    other = train.rename(copy / "out-train.array_record-00000-of-00002")
    with pytest.raises(DataError, match=r"`out-train.array_record-00001-of-00002` is missing"):
        read_folder(copy)
    shutil.copy(other, train)
    with pytest.raises(DataError, match="belongs to another data set"):
        read_folder(copy)
    with pytest.raises(DataError, match=r"no array_record files.*curvax convert"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"label\.labels\.txt is not a folder .* it is a file"):
        read_folder(copy / array_records.CLASSES)


@pytest.mark.parametrize("features", [{"objects": {}}, {"label": {"tensor": {}}}])
def test_records_without_classes_raise(features, copy):
    told = {"featuresDict": {"features": features}}
    (copy / array_records.CLASSES).unlink()
    (copy / "features.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="no feature `label` with classes"):
        read_folder(copy)


def tagged(number, content):
    """A field of a protocol buffer: its number and wire type 2, its length, its bytes."""
    return bytes([number << 3 | 2, len(content)]) + content


def test_records_have_the_wire_format_of_tensorflow():
    features = {
        b"file_name": tagged(1, tagged(1, b"a.jpg")),  # Feature.bytes_list, BytesList.value
        b"image": tagged(1, tagged(1, b"\xff\xd8")),
        b"label": tagged(3, tagged(1, b"\xac\x02")),  # Feature.int64_list, packed varints
    }
    entries = [tagged(1, tagged(1, name) + tagged(2, kind)) for name, kind in features.items()]
    record = tagged(1, b"".join(entries))
    example = tf_example.Example(b"\xff\xd8", 300, "a.jpg")
    assert tf_example.encode(example) == record
    box = tagged(
        2, tagged(1, np.asarray([0, 1], np.float32).tobytes())
    )  # Feature.float_list, packed
    more = tagged(1, tagged(1, tagged(1, b"box") + tagged(2, box)))
    assert tf_example.decode(record + more) == example


def test_the_generated_messages_are_those_of_the_proto_file():
    path = Path(tf_example_pb2.__file__)
    text = (path.parent / "tf_example.proto").read_text()
    assert f"-I. --python_out=. {tf_example_pb2.DESCRIPTOR.name}" in text
    declared = {
        message: dict(re.findall(r"(\w+) = (\d+);", fields))
        for message, fields in re.findall(r"^message (\w+) {(.*?)^}", text, re.M | re.S)
    }
    generated = {
        name: {field.name: str(field.number) for field in message.fields}
        for name, message in tf_example_pb2.DESCRIPTOR.message_types_by_name.items()
    }
    assert declared == generated


def test_file_names_that_are_not_utf8_are_kept():
    name = os.fsdecode(b"caf\xe9.jpg")
    record = tf_example.encode(tf_example.Example(b"", 0, name))
    assert b"caf\xe9.jpg" in record
    assert tf_example.decode(record).name == "caf\ufffd.jpg"


def test_missing_part_raises_with_the_existing_ones(converted):
    with pytest.raises(DataError, match=r"has the parts train, validation, and none.*`test`"):
        read_folder(converted).part("test")


def test_records_of_another_format_raise(tmp_path):
    writer = convert.ArrayRecordWriter(str(tmp_path / "x-train.array_record-00000-of-00001"))
    for record in (b"text", b"\n\x00"):
        writer.write(record)
    writer.close()
    shards = read_folder(tmp_path).part("train")
    with pytest.raises(DataError, match=r"record 0 of \S+ cannot be used: it is not a `tf.train"):
        shards.read(0)
    with pytest.raises(DataError, match="not one `image` and one `label`"):
        shards.read(1)


def test_example_numbers_run_through_the_files(tmp_path):
    for number, count in enumerate((2, 3, 1)):
        name = array_records.shard_name("x", "train", number, 3)
        writer = convert.ArrayRecordWriter(str(tmp_path / name))
        for i in range(count):
            writer.write(tf_example.encode(tf_example.Example(b"", 10 * number + i)))
        writer.close()
    shards = Shards(sorted(tmp_path.iterdir()))
    assert [shards.read(n).label for n in range(6)] == [0, 1, 10, 11, 12, 20]
    assert shards.place(4) == f"record 2 of {tmp_path}/x-train.array_record-00001-of-00003"
    np.testing.assert_equal(shards.size, 6)
