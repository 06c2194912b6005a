"""Published ViT and Mixer checkpoints (`.npz`) ↦ parameters under the names of these models.

google-research/vision_transformer and google-research/big_vision flatten the trees of their Flax
models, with `/` between names. Checkpoints of big_vision's trainer have the prefix `params/`,
formerly `opt/target/`, and stack the layers of scanned models. The axes of kernels are the same.
"""

import math
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

Arrays = dict[str, np.ndarray]
"""Arrays by path, with `/` between names."""

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
    """Renames the parameters of a published checkpoint.

    In vision_transformer and in early big_vision checkpoints the first position embedding belongs
    to the class token; it is added to the token here, which has no position in these models.
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
    """Whether `count` is a positive square, as for the patches of a square image."""
    return count > 0 and math.isqrt(count) ** 2 == count


def _numbers(x: np.ndarray) -> np.ndarray:
    """Restores bfloat16, which NumPy saves as void of two bytes."""
    return x.view(ml_dtypes.bfloat16) if x.dtype == np.dtype("V2") else x


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED:
        name = theirs.sub(ours, name)
    return name
