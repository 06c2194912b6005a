"""Published methods, each a pipe of a few stages."""

from curvax.methods.diagonal import adahessian, diagonal_natural_gradient, sophia_g, sophia_h
from curvax.methods.kronecker import ekfac, kfac, shampoo, soap
from curvax.methods.matrix_free import gauss_newton, hessian_free, natural_gradient, newton_cg
from curvax.methods.sharpness import entropy_sgd, gsam, look_sam, sam

__all__ = [
    "adahessian",
    "diagonal_natural_gradient",
    "ekfac",
    "entropy_sgd",
    "gauss_newton",
    "gsam",
    "hessian_free",
    "kfac",
    "look_sam",
    "natural_gradient",
    "newton_cg",
    "sam",
    "shampoo",
    "soap",
    "sophia_g",
    "sophia_h",
]
