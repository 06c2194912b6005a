"""Kronecker-factored curvature: a model ↦ G ⊗ A for every parameter that multiplies activations."""

from curvax.curvature.kronecker.corrected import CorrectedFactors
from curvax.curvature.kronecker.estimate import kronecker_factors
from curvax.curvature.kronecker.factors import KroneckerFactors
from curvax.curvature.kronecker.plan import LeafReport

__all__ = ["CorrectedFactors", "KroneckerFactors", "LeafReport", "kronecker_factors"]
