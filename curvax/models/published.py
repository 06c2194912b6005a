"""Published ViTs and Mixers ↦ the names of ours: the `.npz` of vision_transformer and big_vision.

google-research/vision_transformer and google-research/big_vision flatten the trees of their Flax
models, with `/` between the names; what big_vision's trainer writes has `params/` before them,
formerly `opt/target/`, and the layers of a scanned model are stacked. Their kernels and ours have
the same axes.
"""

import math
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

Arrays = dict[str, np.ndarray]
"""Arrays by the names of their places, with `/` between them."""

POSITIONS = "pos_embedding"
_ROOTS = ("params/", "opt/target/")
_RENAMED = [
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"^Transformer/encoderblock|^MixerBlock", "block"),
        (r"^Transformer/encoder_norm|^pre_head_layer_norm", "norm"),
        (r"^Transformer/(posembed_input/)?pos_embedding$", POSITIONS),
        (r"^stem/", "embedding/"),
        (r"/LayerNorm_0/", "/norm1/"),
        (r"/LayerNorm_[12]/", "/norm2/"),
        (r"/MultiHeadDotProductAttention_[01]/", "/attention/"),
        (r"/MlpBlock_[03]/", "/mlp/"),
        (r"/token_mixing/", "/token_mlp/"),
        (r"/channel_mixing/", "/channel_mlp/"),
    )
]


def renamed(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The parameters of a published file under the names of our models.

    In vision_transformer, and in big_vision at first, the class token has a position of its own,
    the first, which is added to it here; now, and with us, it has none.
    """
    root = next((root for root in _ROOTS if any(name.startswith(root) for name in arrays)), "")
    inside = {k.removeprefix(root): v for k, v in arrays.items() if k.startswith(root)}
    found = {_renamed(name): _numbers(x) for name, x in inside.items()}
    places = found.get(POSITIONS)
    if places is not None and "cls" in found and _squares(places.shape[1] - 1):
        found["cls"] = found["cls"] + places[:, :1]
        found[POSITIONS] = places[:, 1:]
    return found


def _squares(count: int) -> bool:
    """Whether patches of a square image may be as many."""
    return count > 0 and math.isqrt(count) ** 2 == count


def _numbers(x: np.ndarray) -> np.ndarray:
    """Arrays of bfloat16, which NumPy writes as two bytes without a meaning."""
    return x.view(ml_dtypes.bfloat16) if x.dtype == np.dtype("V2") else x


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED:
        name = theirs.sub(ours, name)
    return name
