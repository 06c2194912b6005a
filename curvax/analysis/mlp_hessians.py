"""A perceptron and a point ↦ the Hessian blocks of its kernels for each example, as factors."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.analysis.compiling import compiled_once
from curvax.analysis.jacobians import outputs_alone
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.differentiability import check_mode
from curvax.curvature.hessian import gradient_and_product, linearized_gradient
from curvax.objective import (
    Objective,
    as_objective,
    loss_of_outputs,
    map_examples,
    require_batch,
    require_model,
)


class MlpBlockHessian(NamedTuple):
    """Result of `mlp_block_hessians`: ∇²ℓ = (a aᵀ) ⊗ H of each example and its factors."""

    inputs: jax.Array
    """a_{k-1}, the inputs of the layer, [n, in]."""
    hessian: jax.Array
    """H_k, the Hessian with respect to the pre-activations and to the bias, [n, out, out]."""
    largest: jax.Array
    """λ_max of the block, ‖a_{k-1}‖² λ_max(H_k), [n]; 0 if H_k has no positive eigenvalue."""
    input_norm: jax.Array
    """‖a_{k-1}‖₂, [n]."""
    weight_norm: jax.Array
    """‖W_{k+1}‖₂, the largest singular value of the next kernel, scalar; 1 for the last layer."""
    slope_norm: jax.Array
    """‖B_k‖_F of the slopes f'(h_k), [n]; √out for the last layer."""
    bend_norm: jax.Array
    """‖D_k‖_F of the bends f''(h_k) ∂ℓ/∂a_k, [n]; 0 for the last layer."""
    active: jax.Array
    """The share of units with pre-activation h_k > 0, [n]."""

    @property
    def matrix(self) -> jax.Array:
        """The full block, [n, in·out, in·out], in the order of a flattened Flax kernel."""
        a, h = self.inputs, self.hessian
        size = a.shape[1] * h.shape[1]
        return jnp.einsum("ni,nj,nop->niojp", a, a, h).reshape(len(a), size, size)


class _Layer(NamedTuple):
    kernel: jax.Array
    """[in, out]"""
    bias: jax.Array | float


def mlp_block_hessians(
    objective: Objective,
    params: Tree,
    layers: Sequence[str],
    inputs: str | Callable[[Tree], jax.Array],
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
    mode: str = "auto",
) -> dict[str, MlpBlockHessian]:
    """Computes the diagonal blocks of a perceptron's Hessian, by recursion from the last layer.

        ∇²_{W_k} ℓ = (a_{k-1} a_{k-1}ᵀ) ⊗ H_k,   H_k = B_k W_{k+1}ᵀ H_{k+1} W_{k+1} B_k + D_k
        B_k = diag f'(h_k),   D_k = diag(f''(h_k) ∂ℓ/∂a_k)

    where h_k = W_k a_{k-1} + b_k and a_k = f(h_k). The block of the mean loss is the mean over
    examples. Chen, Hsieh & Gong, arXiv:2106.01548, eq. 3 and 4; Botev, Ritter & Barber,
    arXiv:1706.03662.

    Args:
        objective: an `Objective` with `model=`, the perceptron.
        params: the point θ.
        layers: the paths of all dense layers in order, such as `"layer0"` or `"mlp/Dense_0"`, each
            with a Flax `kernel` [in, out] and optionally a `bias`.
        inputs: the inputs of the first layer [n, ...], which are flattened: a key of the batch, or
            a callable `batch -> array`.
        activation: f, elementwise, after every layer but the last.
        mode: differentiation mode of the second derivatives of f and of the loss, as in `hvp`.

    Returns:
        `{layer: MlpBlockHessian}`; H_k holds n·out² numbers.

    Raises:
        ValueError: an unknown mode; a path without a kernel of two axes; or, in an eager call,
            layers whose outputs differ from those of the model.

    Examples:
        >>> import jax.numpy as jnp
        >>> import curvax
        >>> batch = {"x": jnp.array([[1.0, 2.0]]), "y": jnp.zeros((1, 1))}
        >>> model = lambda params, batch: batch["x"] @ params["head"]["kernel"]
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=model)
        >>> params = {"head": {"kernel": jnp.ones((2, 1))}}
        >>> found = curvax.analysis.mlp_block_hessians(objective, params, ["head"], "x")
        >>> round(float(found["head"].largest[0]), 3)  # ‖a‖² λ_max(H) = 5 · 1
        5.0
    """
    name = "`mlp_block_hessians`"
    check_mode(mode)
    objective = require_batch(as_objective(objective, "mlp_block_hessians", params), name)
    require_model(objective, name)
    chain = tuple(_layer(params, path) for path in layers)
    _check_widths(chain, layers)
    found, difference = _recursion(
        objective, params, chain, inputs=inputs, activation=activation, mode=mode
    )
    _check_outputs(difference)
    return dict(zip(layers, found, strict=True))


@compiled_once
def _recursion(
    objective: Objective,
    params: Tree,
    chain: tuple[_Layer, ...],
    *,
    inputs: str | Callable[[Tree], jax.Array],
    activation: Callable[[jax.Array], jax.Array],
    mode: str,
) -> tuple[list[MlpBlockHessian], jax.Array]:
    def one(part: Objective, chain: tuple[_Layer, ...]) -> tuple[list[MlpBlockHessian], jax.Array]:
        fed = inputs(part.batch) if callable(inputs) else part.batch[inputs]
        x = trees.widen(fed[0].ravel())
        return _blocks(chain, x, activation, lambda z: loss_of_outputs(part, z[None]), mode)

    with jax.default_matmul_precision("highest"):
        (blocks, outputs), _ = map_examples(objective, one, chain)
        expected = outputs_alone(objective, params)
    blocks = [b._replace(weight_norm=b.weight_norm[0]) for b in blocks]
    if outputs.shape != expected.shape:
        return blocks, jnp.full((), jnp.inf)
    rounding = jnp.finfo(expected.dtype).eps ** 0.5 * (1 + jnp.max(jnp.abs(expected)))
    return blocks, jnp.max(jnp.abs(outputs - expected)) / rounding


def _blocks(
    chain: tuple[_Layer, ...],
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    loss: Callable[[jax.Array], jax.Array],
    mode: str,
) -> tuple[list[MlpBlockHessian], jax.Array]:
    """The blocks of one example in the order of the layers, and its outputs."""
    fed, pre = [x], []
    for kernel, bias in chain:
        pre.append(fed[-1] @ kernel + bias)
        fed.append(activation(pre[-1]))
    z = pre[-1]
    (_, delta), product = linearized_gradient(Objective(loss), z, mode=mode)
    hessian = jax.vmap(product)(jnp.eye(z.size, dtype=z.dtype))
    blocks = [_block(fed[-2], hessian, z, jnp.ones(()), jnp.ones_like(z), jnp.zeros_like(z))]
    for a, h, above in reversed(list(zip(fed, pre, chain[1:]))):
        slope, bend = _derivatives(activation, h, mode)
        back = above.kernel @ delta
        outer = above.kernel @ hessian @ above.kernel.T
        bent = bend * back
        hessian = slope[:, None] * outer * slope[None] + jnp.diag(bent)
        delta = slope * back
        weight_norm = jnp.linalg.norm(above.kernel, 2)
        blocks.append(_block(a, hessian, h, weight_norm, slope, bent))
    return blocks[::-1], z


def _block(
    a: jax.Array,
    hessian: jax.Array,
    h: jax.Array,
    weight_norm: jax.Array,
    slope: jax.Array,
    bent: jax.Array,
) -> MlpBlockHessian:
    norm = jnp.linalg.norm
    top = jnp.sum(a**2) * jnp.linalg.eigvalsh(hessian)[-1]
    return MlpBlockHessian(
        inputs=a,
        hessian=hessian,
        largest=top if a.size == 1 else jnp.maximum(top, 0),
        input_norm=norm(a),
        weight_norm=weight_norm,
        slope_norm=norm(slope),
        bend_norm=norm(bent),
        active=jnp.mean(h > 0, dtype=h.dtype),
    )


def _derivatives(
    f: Callable[[jax.Array], jax.Array], h: jax.Array, mode: str
) -> tuple[jax.Array, jax.Array]:
    """(f'(h), f''(h)) of an elementwise function."""
    total = Objective(lambda x: jnp.sum(f(x)))
    (_, slope), bend = gradient_and_product(total, h, jnp.ones_like(h), mode=mode)
    return slope, bend


def _layer(params: Tree, path: str) -> _Layer:
    """The kernel and the bias at a path, in float32 or wider.

    Raises:
        ValueError: no kernel of two axes at the path.
    """
    steps = tuple(path.split("/"))
    below: dict[str, Any] = {
        trees.names(place)[len(steps)]: trees.widen(x)
        for place, x in jax.tree.leaves_with_path(params)
        if trees.names(place)[: len(steps)] == steps and len(place) > len(steps)
    }
    kernel = below.get("kernel")
    if kernel is None or kernel.ndim != 2:
        has = "no kernel" if kernel is None else f"one of shape {list(kernel.shape)}"
        paths = [trees.names(place) for place, _ in jax.tree.leaves_with_path(params)]
        raise ValueError(
            f"`mlp_block_hessians` takes dense layers with a `kernel` [in, out], and `{path}` has "
            f"{has}. Name such layers; the parameters are {', '.join(map(trees.label, paths))}."
        )
    return _Layer(kernel, below.get("bias", 0.0))


def _check_widths(chain: tuple[_Layer, ...], layers: Sequence[str]) -> None:
    for (below, above), names in zip(pairwise(chain), pairwise(layers)):
        shapes = below.kernel.shape, above.kernel.shape
        if shapes[0][1] != shapes[1][0]:
            raise ValueError(
                f"`mlp_block_hessians` takes the layers in order, and `{names[1]}` of shape "
                f"{shapes[1]} cannot follow `{names[0]}` of shape {shapes[0]}. Name every dense "
                "layer, starting at the inputs."
            )


def _check_outputs(difference: jax.Array) -> None:
    if isinstance(difference, jax.core.Tracer) or not difference > 1:
        return
    raise ValueError(
        "`mlp_block_hessians` got layers, inputs and an activation whose outputs differ from those "
        "of the `model` of the objective. Name every dense layer in order, and the `activation=` "
        "between them."
    )
