"""Training on images in records: batches that any number of threads and processes share, damaged
records, and a run from folders of JPEGs to a resumed training."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import photographs
import pytest

from curvax.training import loop, run_data
from curvax.training import tasks as training_tasks
from curvax.training.checkpoints import Checkpoints
from curvax.training.compare import comparison
from curvax.training.config import defaults
from curvax.training.config.configs import override
from curvax.training.data import array_records, convert, datasets, encoded_images, tf_example
from curvax.training.data.archives import DataError
from curvax.training.data.tf_example import Example
from curvax.training.experiment import build
from curvax.training.runtime.errors import ConfigError

SIDE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of 3 classes: 42 images to train on, 15 to test on."""
    root = photographs.write_parts(tmp_path_factory.mktemp("records"), 14, 5)
    convert.convert(convert.find_parts(root), root / "made")
    return root / "made"


def make_config(path, **fields):
    config = defaults(lr=1e-2)
    config.model.name = "mixer_tiny"
    config.model.options.update(
        depth=1, scan=False, width=8, token_width=4, channel_width=8, patch=4
    )
    config.data.update(name="records", path=str(path), image_size=SIDE, threads=2)
    config.optimizer = "sam_perturb(0.05) | adamw(cosine(lr))"
    config.update(batch=8, epochs=2, log_every=1, checkpoint_every=3, hessian_examples=0)
    return comparison.replace(config, **fields)


def load(path, **options):
    config = make_config(path)
    config.data.update(**options)
    return encoded_images.load(config.data)


def batches_of(split, shards=1, start=0, **options):
    """The batches of every process, put together again, from the `start`-th on."""
    parts = [datasets.batches(split, 8, shard=i, shards=shards, **options) for i in range(shards)]
    for part in parts:
        part.set_state({"next_index": start})
    for each in zip(*parts):
        yield {name: np.concatenate([batch[name] for batch in each]) for name in each[0]}


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name])


def write_records(path, some, name="x-train.array_record-00000-of-00001"):
    """A file of records, one of a test part, and the names of three classes."""
    path.mkdir(exist_ok=True)
    for file in (name, name.replace("train", "validation")):
        writer = convert.ArrayRecordWriter(str(path / file), "group_size:1")
        for example in some:
            writer.write(tf_example.encode(example))
        writer.close()
    (path / array_records.CLASSES).write_text("a\nb\nc\n")
    return path


def some_examples(count=16):
    pieces = photographs.pieces(photographs.photographs()["bloom"], count, seed=0)
    return [Example(photographs.jpeg(p), i % 3, f"p{i}.JPEG") for i, p in enumerate(pieces)]


# Batches


def test_batches_of_records_are_bytes_with_labels_and_class_names(folder):
    dataset = load(folder)
    assert (dataset.train.size, dataset.test.size, dataset.classes) == (42, 15, 3)
    assert list(dataset.names) == list(photographs.CLASSES)
    batch = next(datasets.batches(dataset.train, 8))
    assert batch["input"].shape == (8, SIDE, SIDE, 3)
    assert batch["input"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    assert 60 < batch["input"].mean() < 200


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_all_processes_join_to_the_batch_of_one(folder, shards):
    split = load(folder).train
    for batch, other in zip(
        batches_of(split, epochs=2, seed=3), batches_of(split, shards, epochs=2, seed=3)
    ):
        assert_same(batch, other)


def test_number_of_threads_does_not_change_batches(folder):
    one, three = (load(folder, threads=n).train for n in (1, 3))
    for batch, other in zip(batches_of(one, epochs=1), batches_of(three, epochs=1)):
        assert_same(batch, other)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_resuming_in_the_middle_of_an_epoch_is_exact(folder, shards):
    split = load(folder).train
    straight = list(batches_of(split, epochs=3, seed=1))
    assert len(straight) == 15
    parts = [
        datasets.batches(split, 8, epochs=3, seed=1, shard=i, shards=shards) for i in range(shards)
    ]
    for _ in range(7):  # into the second epoch, with two more batches under way
        for part in parts:
            next(part)
    places = [json.loads(json.dumps(part.get_state())) for part in parts]
    assert places == [{"next_index": 7}] * shards
    resumed = batches_of(split, shards, start=7, epochs=3, seed=1)
    for batch, other in zip(straight[7:], resumed, strict=True):
        assert_same(batch, other)


def test_epoch_has_every_example_once_with_new_crops(folder):
    split = load(folder).train
    numbers = split.gather(np.arange(split.size))["input"]  # as in a test: names each example
    assert len({image.tobytes() for image in numbers}) == split.size
    first = split.gather(np.arange(4), (0, 0))["input"]
    np.testing.assert_array_equal(first, split.gather(np.arange(4), (0, 0))["input"])
    for draw in ((0, 1), (1, 0)):
        assert not np.array_equal(first, split.gather(np.arange(4), draw)["input"])
    counts = np.zeros(split.size, int)
    whole = {image.tobytes(): i for i, image in enumerate(numbers)}
    for batch in datasets.batches(split, 6, shuffle=False, epochs=1):
        for image in batch["input"]:
            counts[whole[image.tobytes()]] += 1
    np.testing.assert_array_equal(counts, 1)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 12, 16])
def test_test_set_shows_every_example_once_for_any_batch_size(folder, shards, batch_size):
    split = load(folder).test
    seen = []
    for shard in range(shards):
        for batch in datasets.batches(
            split,
            batch_size,
            shuffle=False,
            epochs=1,
            drop_remainder=False,
            shard=shard,
            shards=shards,
        ):
            seen += [image.tobytes() for image in batch["input"][batch["mask"]]]
    expected = [image.tobytes() for image in split.gather(np.arange(split.size))["input"]]
    assert sorted(seen) == sorted(expected)
    assert len(seen) == 15


def test_smaller_part_of_the_records_is_contained_in_a_larger_one(folder):
    split = load(folder).train
    few, more = (datasets.take(split, count, seed=0) for count in (10, 20))
    assert set(few.chosen) < set(more.chosen)
    assert (few.size, more.size) == (10, 20)
    # an example keeps its crops in any part of the data
    where = np.flatnonzero(split.chosen == few.chosen[3])
    np.testing.assert_array_equal(
        few.gather(np.array([3]), (0, 5))["input"], split.gather(where, (0, 5))["input"]
    )


def test_batches_are_prefetched_in_threads(folder):
    split, asked = load(folder).train, []

    class Watched(encoded_images.EncodedImages):
        def gather(self, rows, draw=None):
            asked.append(threading.current_thread())
            return super().gather(rows, draw)

    batches = datasets.batches(Watched(*split), 8)
    next(batches)
    deadline = time.monotonic() + 20
    while len(asked) < 1 + encoded_images.AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(asked) == 1 + encoded_images.AHEAD
    assert threading.current_thread() not in asked


# Where they come from


def test_folder_of_tfds_is_read(tmp_path):
    write_records(tmp_path, some_examples(), "imagenet2012-train.array_record-00000-of-00001")
    (tmp_path / array_records.CLASSES).unlink()
    with pytest.raises(DataError, match=r"does not name its classes.*label.labels.txt"):
        load(tmp_path)
    label = {"pythonClassName": "ClassLabel", "classLabel": {"numClasses": "3"}}
    features = {"featuresDict": {"features": {"image": {}, "label": label}}}
    (tmp_path / "features.json").write_text(json.dumps(features))
    dataset = load(tmp_path)
    assert (dataset.train.size, dataset.test.size, dataset.classes) == (16, 16, 3)
    np.testing.assert_array_equal(
        next(datasets.batches(dataset.test, 4, shuffle=False))["label"], [0, 1, 2, 0]
    )


def test_records_written_by_tfds_are_read_as_by_tfds(tmp_path):
    why = "pip install tensorflow-datasets tensorflow-cpu"
    tfds: Any = pytest.importorskip("tensorflow_datasets", reason=why)
    pytest.importorskip("tensorflow", reason=why)
    root = photographs.write_parts(tmp_path / "pictures", 6, 3)

    base: Any = tfds.core.GeneratorBasedBuilder

    class Small(base):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            kinds = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=sorted(photographs.CLASSES)),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

        def _split_generators(self, dl_manager):
            return {part: self._generate_examples(root / part) for part in ("train", "val")}

        def _generate_examples(self, folder):
            for file in sorted(folder.glob("*/*")):
                fields = {"image": str(file), "label": file.parent.name, "file_name": file.name}
                yield f"{file.parent.name}/{file.name}", fields

    builder = Small(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    folder = array_records.read_folder(Path(builder.data_dir))
    assert (folder.names, folder.classes) == (sorted(photographs.CLASSES), 3)
    for part, count in (("train", 18), ("val", 9)):
        ours = folder.part(part)
        theirs = builder.as_data_source(split=part, decoders={"image": tfds.decode.SkipDecoding()})
        assert ours.size == len(theirs) == count
        for number, each in enumerate(theirs):
            expected = Example(each["image"], each["label"], each["file_name"].decode())
            assert ours.read(number) == expected


def test_imagenet_with_another_number_of_classes_is_refused(folder):
    with pytest.raises(DataError, match=r"1000 classes, and \S+ has 3.*\"records\""):
        load(folder, name="imagenet")


@pytest.mark.parametrize("area", ["(1.0, 0.1)", "(0.5,)", "(0.1, 3.0)", "(0, 1)", "('a', 'b')"])
def test_crop_area_out_of_range_is_refused(folder, area):
    config = override(make_config(folder), [f"--data.crop_area={area}"])
    with pytest.raises(DataError, match=rf"`data.crop_area` is .* and was {re.escape(area)}"):
        build(config)
    assert load(folder, crop_area=[0.2, 0.2]).train.decoding.area == (0.2, 0.2)


def test_missing_path_raises():
    config = defaults()
    config.data.name = "imagenet"
    with pytest.raises(DataError, match=r"`imagenet` cannot be read.*`curvax convert"):
        encoded_images.load(config.data)


def test_label_noise_and_autoencoders_are_refused(folder):
    config = make_config(folder)
    config.data.label_noise = 0.2
    with pytest.raises(DataError, match=r"`data.label_noise` replaces labels in memory"):
        run_data.load(config, training_tasks.build(config))
    config = make_config(folder, task="autoencoder")
    config.data.image_size = None
    with pytest.raises(ConfigError, match="images in memory"):
        training_tasks.build(config).load(0)


# Faults: raised within a deadline, in any state of the threads


def first_error(batches, seconds=60):
    """What the batches raise, from a thread so that a test of a hang ends."""
    caught = []

    def ask():
        try:
            for _ in batches:
                pass
        except DataError as error:
            caught.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()
    return str(caught[0])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda e: e._replace(image=e.image[: len(e.image) // 2]),
            "it cannot be decoded: image file is truncated",
        ),
        (lambda e: e._replace(image=b"GIF?"), "it cannot be decoded: Pillow does not know"),
        (lambda e: e._replace(label=3), "its label is 3, and there are 3 classes"),
        (lambda e: e._replace(label=-1), "its label is -1"),
    ],
)
def test_damaged_record_raises_with_its_place_and_name(tmp_path, spoil, words):
    some = some_examples()
    some[11] = spoil(some[11])
    split = load(write_records(tmp_path, some)).train
    told = first_error(datasets.batches(split, 4, epochs=1))
    assert words in told
    file = tmp_path / "x-train.array_record-00000-of-00001"
    assert told.startswith(f"`p11.JPEG`, record 11 of {file}, cannot be used")
    assert "`curvax convert`" in told


# A run from folders to a resumed training


def test_images_reach_the_model_between_minus_one_and_one(folder):
    config = make_config(folder)
    task = training_tasks.build(config)
    batch = next(datasets.batches(task.load(0).test, 8, shuffle=False))
    prepared = task.in_test(batch)
    np.testing.assert_allclose(prepared["input"], batch["input"] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(np.argmax(prepared["label"], -1), batch["label"])
    config.data.update(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 0.5))
    scaled = training_tasks.build(config).in_test(batch)["input"]
    np.testing.assert_allclose(scaled, batch["input"] / (255, 255, 127.5), atol=1e-6)
    config.data.std = None
    with pytest.raises(DataError, match="are used together"):
        training_tasks.build(config)


@pytest.mark.parametrize(
    ("name", "mean", "std", "channels"),
    [
        ("records", (0.5, 0.5), (0.5, 0.5), 3),
        ("records", (0.5, 0.5, 0.5), (0.5,), 3),
        ("digits", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1),  # would become three channels
    ],
)
def test_mean_and_std_of_another_number_of_channels_are_refused(folder, name, mean, std, channels):
    config = make_config(folder)
    config.data.update(name=name, mean=mean, std=std)
    with pytest.raises(DataError, match=rf"of `{name}` have {channels}, and were \(0\.5, "):
        training_tasks.build(config)


def test_building_a_run_decodes_one_image(folder, monkeypatch):
    """In each process of a pod: a batch of the whole is thousands."""
    decode, decoded = encoded_images.EncodedImages._decode, set()

    def counted(self, number, draw):
        decoded.add(number)
        return decode(self, number, draw)

    monkeypatch.setattr(encoded_images.EncodedImages, "_decode", counted)
    build(make_config(folder, optimizer="sgd(0.1)"))
    assert decoded == {0}


def test_a_run_on_records_resumes_in_the_middle_of_an_epoch(folder, tmp_path):
    config = make_config(folder)
    config.data.augment = ["mixup()", "rand_augment(2, 10)"]
    experiment = build(config)
    whole = loop.fit(experiment, tmp_path / "whole")
    assert whole.metrics["steps"] == 10
    assert whole.metrics["train_examples"] == 42

    def stop(step, figures):
        if step == 4:  # of 5 in an epoch, a step after a checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.fit(experiment, tmp_path / "parted", stop)
    parted = loop.fit(build(config), tmp_path / "parted")
    assert parted.records == whole.records
    assert parted.metrics | {"seconds": 0} == whole.metrics | {"seconds": 0}


def test_run_stopped_by_a_damaged_record_resumes_after_its_repair(tmp_path):
    some = some_examples(32)
    spoilt = [*some]
    spoilt[11] = some[11]._replace(image=some[11].image[:100])
    config = make_config(write_records(tmp_path / "records", some), checkpoint_every=1)
    experiment = build(config)
    whole = loop.fit(experiment, tmp_path / "whole")
    write_records(tmp_path / "records", spoilt)
    with pytest.raises(DataError, match=r"`p11.JPEG`, record 11 .* cannot be used"):
        loop.fit(build(config), tmp_path / "parted")
    kept = Checkpoints(tmp_path / "parted" / "checkpoints", read_only=True)
    assert 0 < int(kept.restore(experiment.shapes)[0].step) < whole.metrics["steps"]
    write_records(tmp_path / "records", some)
    mended = loop.fit(build(config), tmp_path / "parted")
    assert mended.records == whole.records
