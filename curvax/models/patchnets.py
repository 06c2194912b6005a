"""Networks over the patches of an image, and the embedding of the patches."""

import jax
from flax import linen as nn

from curvax.models.blocks import BlockNet


class PatchNet(BlockNet, kw_only=True):
    """A network of blocks over the patches of an image.

    Attributes:
        patch: side of a patch in pixels.
    """

    patch: int

    def embed(self, x: jax.Array) -> jax.Array:
        """Embeds each patch linearly: (N, H, W, C) ↦ (N, H / patch, W / patch, width).

        Raises:
            ValueError: the patch does not divide the image.
        """
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f"`patch` divides the image's height and width, and {self.patch} does not divide "
                f"{x.shape[1]}×{x.shape[2]}. Resize the images or pass another `patch`."
            )
        window = (self.patch, self.patch)
        embedding = nn.Conv(self.width, window, window, "VALID", dtype=self.dtype, name="embedding")
        return embedding(x)
