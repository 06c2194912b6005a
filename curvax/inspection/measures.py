"""The measures of `curvax inspect`, the most informative first, with their cost.

Radii, probes and grids are the same for every run, so that the runs can be compared.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import Objective, analysis
from curvax.inspection.budget import Work
from curvax.inspection.checkpoint_loss import CheckpointLoss, Predict
from curvax.models import Perceptron
from curvax.models.perceptron import ACTIVATIONS

RHO = 0.05
"""SAM's default radius; Foret et al., arXiv:2010.01412."""
RHOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
GROUPS = (4, 32)
"""m of m-sharpness, in addition to the whole set; Foret et al., section 4.1."""
DEVIATION = 0.01
"""Standard deviation of each entry of a random perturbation."""
KERNEL_ROWS = 1024
KERNEL_BYTES = 2**28
"""Largest Jacobian of one example, so that the kernel takes seconds."""
HELD_BASIS = 2**22
"""Number of parameters up to which Lanczos keeps its forty vectors in memory."""
PERCEPTRON_EXAMPLES = 64
SHOWN = 4
"""Number of examples whose attention is kept."""


class Measure(NamedTuple):
    """One thing to measure."""

    name: str
    title: str
    take: Callable[[CheckpointLoss], Any]
    work: Callable[[CheckpointLoss], Work]
    excuse: Callable[[CheckpointLoss], str] = lambda point: ""
    """The reason why the measure does not apply; \"\" if it does."""


class LossSlices(NamedTuple):
    """The loss along the top eigenvector, and in a plane of filter-normalised random directions."""

    line: analysis.Landscape
    plane: analysis.Landscape


class ActivationStats(NamedTuple):
    """Statistics of the hidden units, by activation."""

    active: Mapping[str, jax.Array]
    norms: Mapping[str, jax.Array]


class Kernel(NamedTuple):
    """The neural tangent kernel of the first examples, summed over outputs, and its condition."""

    trace: jax.Array
    """[n, n]"""
    eigenvalues: jax.Array
    """Of the full kernel, ascending, [n·C]."""
    condition: analysis.ConditionNumber


def eigenpairs(point: CheckpointLoss) -> Any:
    """The top eigenpairs, without their vectors."""
    return point.pairs._replace(vectors=None)


def sharpness(point: CheckpointLoss) -> Any:
    """{ρ: Sharpness} by three steps of ascent."""
    take = lambda rho: analysis.sharpness(point.objective, point.params, rho, steps=3)
    return {rho: take(rho) for rho in RHOS}


def surrogate_gap(point: CheckpointLoss) -> Any:
    """{ρ: SurrogateGap}"""
    return {rho: analysis.surrogate_gap(point.objective, point.params, rho) for rho in RHOS}


def blocks(point: CheckpointLoss) -> Any:
    return analysis.block_eigenvalues(
        point.objective, point.params, point.layout, tol=1e-2, max_products=30, subspace=12
    )


def spectrum(point: CheckpointLoss) -> Any:
    keep_basis = point.size <= HELD_BASIS
    return analysis.hessian_spectrum(
        point.objective, point.params, probes=2, steps=40, keep_basis=keep_basis
    )


def trace(point: CheckpointLoss) -> Any:
    return analysis.curvature_trace(point.objective, point.params)


def landscape(point: CheckpointLoss) -> LossSlices:
    along = jax.tree.map(lambda v: v[0], point.pairs.vectors)
    random = analysis.filter_normalised(
        analysis.random_directions(point.params), point.params, point.layout
    )
    take = lambda directions, **grid: analysis.landscape(
        point.objective, point.params, directions, **grid
    )
    return LossSlices(take(along, span=0.5, points=41), take(random, span=1.0, points=17))


def inside(point: CheckpointLoss) -> ActivationStats:
    return ActivationStats(
        analysis.active_fraction(point.objective, point.params),
        analysis.activation_norms(point.objective, point.params),
    )


def weights(point: CheckpointLoss) -> Any:
    return analysis.block_norms(point.params, point.layout)


def m_sharpness(point: CheckpointLoss) -> Any:
    """{m: MSharpness}, the last for the whole set."""
    take = lambda m: analysis.m_sharpness(point.objective, point.params, RHO, m)
    return {m: take(m) for m in _groups(point)}


def alignment(point: CheckpointLoss) -> Any:
    return analysis.alignment(point.gradient, point.pairs.vectors)


def kernel(point: CheckpointLoss) -> Kernel:
    few = _first(point, _kernel_examples(point))
    gram = analysis.ntk(few, point.params)
    flat = gram.reshape(-1, gram.shape[-1] * len(gram))
    return Kernel(
        jnp.einsum("icjc->ij", gram),
        jnp.linalg.eigvalsh(flat),
        analysis.ntk_condition_number(few, point.params, method="dense"),
    )


def random_sharpness(point: CheckpointLoss) -> Any:
    return analysis.random_sharpness(point.held_out, point.params, DEVIATION)


def gradient_angle(point: CheckpointLoss) -> Any:
    """{ρ: GradientAngle}"""
    return {rho: analysis.gradient_angle(point.objective, point.params, rho) for rho in RHOS}


def attention(point: CheckpointLoss) -> Any:
    return analysis.attention_maps(_first(point, SHOWN), point.params)


def perceptron(point: CheckpointLoss) -> Any:
    """{layer: MlpBlockHessian}, without the Hessians themselves."""
    model = _model(point)
    layers = [*(f"layer{n}" for n in range(len(model.widths))), "head"]
    activation = ACTIVATIONS[model.activation]
    found = analysis.mlp_block_hessians(
        _first(point, PERCEPTRON_EXAMPLES), point.params, layers, "input", activation=activation
    )
    nothing = jnp.zeros(0)
    return {name: b._replace(inputs=nothing, hessian=nothing) for name, b in found.items()}


def _model(point: CheckpointLoss) -> Any:
    predict = point.objective.model
    assert isinstance(predict, Predict)
    return predict.model


def _first(point: CheckpointLoss, count: int) -> Objective:
    return point.objective.on(jax.tree.map(lambda x: x[:count], point.objective.batch))


def _kernel_examples(point: CheckpointLoss) -> int:
    return min(max(2, KERNEL_ROWS // point.outputs), point.objective.size)


def _groups(point: CheckpointLoss) -> list[int]:
    n = point.objective.size
    return [m for m in GROUPS if m < n and n % m == 0] + [n]


def _has_no_attention(point: CheckpointLoss) -> str:
    kinds = {leaf.kind for leaf in point.layout.values()}
    return "" if "attention" in kinds else "The model has no attention."


def _is_no_perceptron(point: CheckpointLoss) -> str:
    return "" if isinstance(_model(point), Perceptron) else "The model is not a perceptron."


def _has_too_many_outputs(point: CheckpointLoss) -> str:
    size = 4 * point.outputs * point.size
    if size <= KERNEL_BYTES:
        return ""
    return (
        f"{point.outputs} outputs and {point.size} parameters make a Jacobian of "
        f"{size / 2**30:.1f} GiB for each example."
    )


def _each(compilations: float, gradients: float) -> Callable[[CheckpointLoss], Work]:
    return lambda point: Work(compilations, gradients)


def _kernel_work(point: CheckpointLoss) -> Work:
    return Work(4, 10 * _kernel_examples(point) * point.outputs / point.objective.size)


def _with_pairs(compilations: float, gradients: float) -> Callable[[CheckpointLoss], Work]:
    """The work of a measure that needs the eigenpairs, which are computed once per checkpoint."""

    def work(point: CheckpointLoss) -> Work:
        search = Work(0, 0) if "pairs" in vars(point) else Work(10, 76)
        return Work(compilations + search.compilations, gradients + search.gradients)

    return work


def _blocks_work(point: CheckpointLoss) -> Work:
    return Work(15, 20 * len(point.layout.blocks()))


MEASURES = (
    Measure("eigenpairs", "top eigenpairs", eigenpairs, _with_pairs(0, 0)),
    Measure("surrogate_gap", "surrogate gap", surrogate_gap, _each(4, 16)),
    Measure("sharpness", "sharpness", sharpness, _each(9, 26)),
    Measure("inside", "activations", inside, _each(1, 1)),
    Measure("weights", "weight norms", weights, _each(1, 1)),
    Measure("blocks", "eigenvalues by block", blocks, _blocks_work),
    Measure("alignment", "alignment of the gradient", alignment, _with_pairs(1, 1)),
    Measure("attention", "attention maps", attention, _each(1, 1), _has_no_attention),
    Measure("perceptron", "factors of the blocks", perceptron, _each(8, 8), _is_no_perceptron),
    Measure("landscape", "landscapes", landscape, _with_pairs(18, 85)),
    Measure("trace", "trace", trace, _each(5, 12)),
    Measure("gradient_angle", "turn of the gradient", gradient_angle, _each(3, 8)),
    Measure("random_sharpness", "random sharpness", random_sharpness, _each(4, 3)),
    Measure("kernel", "neural tangent kernel", kernel, _kernel_work, _has_too_many_outputs),
    Measure("spectrum", "spectral density", spectrum, _each(15, 102)),
    Measure("m_sharpness", "m-sharpness", m_sharpness, _each(16, 3)),
)
"""The most informative first. Work was timed for a small MLP-Mixer on two CPU cores, in units of
compiling and of evaluating its gradient."""
