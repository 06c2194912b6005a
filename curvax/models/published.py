"""Published ViTs and Mixers ↦ the names of ours: the `.npz` of vision_transformer and big_vision.

google-research/vision_transformer and google-research/big_vision flatten the trees of their Flax
models, with `/` between the names; big_vision puts `params/` before them, and stacks the layers of
a scanned model. Their kernels and ours have the same axes.
"""

import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

Arrays = dict[str, np.ndarray]
"""Arrays by the names of their places, with `/` between them."""

_POSITIONS = "Transformer/posembed_input/pos_embedding"
_RENAMED = [
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"^Transformer/encoderblock|^MixerBlock", "block"),
        (r"^Transformer/encoder_norm|^pre_head_layer_norm", "norm"),
        (r"^Transformer/posembed_input/", ""),
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

    In vision_transformer the class token has a position of its own, which is added to it here; in
    big_vision, and with us, it has none.
    """
    inside = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
    found = {name: _numbers(x) for name, x in (inside or dict(arrays)).items()}
    if _POSITIONS in found and "cls" in found:
        positions = found[_POSITIONS]
        found["cls"] = found["cls"] + positions[:, :1]
        found[_POSITIONS] = positions[:, 1:]
    return {_renamed(name): x for name, x in found.items()}


def _numbers(x: np.ndarray) -> np.ndarray:
    """Arrays of bfloat16, which NumPy writes as two bytes without a meaning."""
    return x.view(ml_dtypes.bfloat16) if x.dtype == np.dtype("V2") else x


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED:
        name = theirs.sub(ours, name)
    return name
