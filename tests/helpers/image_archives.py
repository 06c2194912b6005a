"""Random images, and archives of them in the format of MNIST."""

import gzip

import numpy as np


def make_images(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder, part, images, labels):
    for kind, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        content = gzip.compress(head + array.astype(np.uint8).tobytes())
        (folder / f"{kind}-ubyte.gz").write_bytes(content)
