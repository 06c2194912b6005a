"""The loss that stages receive: a function of the parameters together with its batch.

Stages evaluate it by `value_and_grad` and by the products of `curvax.curvature`. The batch can be
replaced (`on`), divided into groups (`groups`) or scanned in micro-batches (`microbatch=`); every
piece folds its number into the dropout key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic.trees import Tree
from curvax.devices import axes, meshes
from curvax.likelihoods import Likelihood
from curvax.objective import evaluation, microbatching, pieces, validation
from curvax.objective.aux_values import Reductions, check_reductions
from curvax.objective.gradient_cache import CachedGradient, GradientCache
from curvax.objective.local_axes import traced_axes


class Objective:
    """A loss of the parameters over a batch, which stages can evaluate, differentiate and divide.

        L(θ) = 1/n Σᵢ ℓ(θ, xᵢ)

    Passed to an update as `tx.update(grads, state, params, value_fn=objective)`, and to the
    products `hvp`, `ggnvp`, `fvp` and `empirical_fvp`.

    Args:
        loss: `loss(params, batch) -> scalar`, a mean over the leading axis of `batch`; with
            `model`, `loss(outputs, batch) -> scalar` or a likelihood (`categorical`, `bernoulli`,
            `gaussian`, `poisson`); without a batch, `loss(params) -> scalar`.
        batch: a pytree of arrays that share one leading axis of n examples.
        model: `model(params, batch) -> outputs`, required by Gauss-Newton and Fisher products,
            which differentiate the model and the loss of its outputs separately.
        has_aux: whether the loss returns `(scalar, aux)` or, with `model`, the model returns
            `(outputs, aux)`. In Flax the aux is the new model state.
        key: a typed PRNG key, for dropout. The loss (or the model) receives a key as its third
            argument: the same key in every pass over the same examples, and different keys for
            different groups, micro-batches and devices.
        microbatch: examples in a micro-batch, a divisor of n. Loss, gradient and products are
            accumulated in float32 by a scan over micro-batches, which needs the memory of one.
        weight: `weight(batch) -> scalar`, or the key of a batch entry whose sum is the weight, if
            the loss is a weighted mean (over unmasked tokens, for example). Micro-batches, groups
            and devices are averaged with these weights. A likelihood with `mask` or `weights` has
            its own.
        scale: factor of the loss in every differentiated pass, for models that compute in float16:
            a positive number or a traced scalar, such as Flax's `DynamicScale.scale`. Gradients and
            products are divided by it in float32 or wider and keep that dtype; loss and
            diagnostics are never scaled.
        reduce_aux: how the aux values of micro-batches and groups combine: "mean" (weighted),
            "sum", "max", "min", "last" or "concat" (along the first axis); one name, a tree prefix
            of names, or a callable of the leaf's path. None derives it from the loss, see below.

    Raises:
        ValueError: `microbatch` does not divide the batch, an option needs a batch and there is
            none, a likelihood has no `model`, `scale` is not positive and finite, or `reduce_aux`
            is not one of these reductions.
        TypeError: `key` is not a typed key, or `scale` is not a scalar.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> loss = lambda w, batch: jnp.mean((batch["x"] @ w - batch["y"]) ** 2)
        >>> batch = {"x": jnp.eye(2), "y": jnp.array([1.0, 2.0])}
        >>> objective = curvax.Objective(loss, batch)
        >>> params, tx = jnp.zeros(2), curvax.sam(optax.sgd(0.1), rho=0.05)
        >>> value, grads = objective.value_and_grad(params)
        >>> updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
        >>> round(float(value), 3), updates.shape
        (2.5, (2,))

    The aux over micro-batches:
        The aux equals that of the whole batch. The loss is traced to find where it reduces the
        examples: sums are added over micro-batches, maxima and minima compared, per-example values
        concatenated, and everything computed from these (means, ratios of sums, an F score) is
        computed once at the end. Running averages that are not means over examples, such as batch
        norm's variance, are averaged over the micro-batches; counters advance once; states that
        Flax's fp8 layers overwrite with their gradients take the largest. Anything else (a median,
        a standard deviation, `[0]`) raises an error unless `reduce_aux` names its reduction.

    Loss scaling:
        The second gradient of SAM may overflow at a scale at which the first did not. Check the
        updates too, and if they are not finite skip the step and lower the scale.
        `optax.apply_if_finite` checks the gradient that it receives and therefore belongs after the
        stages, `sam(apply_if_finite(base, 3))`.

            objective = Objective(loss, batch, scale=dynamic_scale.scale)
            new_scale, finite, _, grads = dynamic_scale.value_and_grad(objective)(params)
            updates, new_state = tx.update(grads, state, params, value_fn=objective)
            finite &= jnp.isfinite(optax.tree.norm(updates))

    Sharding:
        On a mesh of explicit axes the batch is resharded once, after which every device computes
        its part of each micro-batch.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        batch: Tree = None,
        *,
        model: Callable[..., Any] | None = None,
        has_aux: bool = False,
        key: jax.Array | None = None,
        microbatch: int | None = None,
        weight: Callable[[Tree], Any] | str | None = None,
        scale: Any = None,
        reduce_aux: Reductions = None,
    ):
        self.loss, self.batch, self.model, self.has_aux = loss, batch, model, has_aux
        self.key, self.microbatch, self.weight, self.scale = key, microbatch, weight, scale
        self.reduce_aux = reduce_aux
        # What is known of this loss; another one starts anew (`pieces.changed`).
        self.gradients = GradientCache()
        self.known_axes: dict[Any, frozenset[str]] = {}
        # The batch is piece i of n of the one that was passed; (batch, *keys) of that, for the aux.
        self.place: tuple[Any, int] = (0, 1)
        self.whole: tuple[Any, ...] | None = None
        # Under `per_group`: whether this is the loss of a group, and the device axes it spans.
        self.grouped = False
        self.joined: tuple[axes.Along, ...] = ()
        validation.check_halves(loss, batch, model)
        validation.check_options(batch, model, key, microbatch, weight)
        validation.check_scale(scale)
        check_reductions(reduce_aux)
        if microbatch is not None:
            microbatching.check_divides(self.size, microbatch, "`Objective(microbatch=)`")

    @property
    def size(self) -> int:
        """The number n of examples in the batch; under a device axis, of this device's part.

        Raises:
            ValueError: there is no batch, or its leaves have different leading axes.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> curvax.Objective(lambda w, x: jnp.mean(w * x), jnp.ones(8)).size
            8
        """
        return validation.batch_size(self.batch)

    def on(self, batch: Tree) -> Objective:
        """The same loss on another batch.

        Args:
            batch: a pytree of arrays that share one leading axis of examples; under a device axis,
                this device's part of it.

        Returns:
            An `Objective` with the same options and an empty gradient cache.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> objective = curvax.Objective(lambda w, x: jnp.mean(w * x), jnp.zeros(8))
            >>> float(objective.on(jnp.full(4, 3.0))(2.0))
            6.0
        """
        return pieces.changed(self, batch=batch)

    def piece(self, batch: Tree, i: Any, n: int) -> Objective:
        """The loss on the i-th of n contiguous pieces of this batch.

        Unlike `on`, folds the number of the piece in the global batch into the dropout key. A piece
        that `microbatch` does not divide is evaluated without micro-batches.

        Args:
            batch: the piece, for example one of `groups`.
            i: its number in [0, n), static or traced.
            n: the number of pieces.

        Returns:
            An `Objective` on the piece.

        Examples:
            >>> import jax, jax.numpy as jnp, curvax
            >>> objective = curvax.Objective(lambda w, x: jnp.mean(w * x), jnp.arange(6.0))
            >>> groups = objective.groups(2)
            >>> [float(objective.piece(groups[i], i, 3)(1.0)) for i in range(3)]
            [0.5, 2.5, 4.5]
        """
        j, m = self.place
        piece = pieces.changed(self, batch=batch, place=(j * n + i, m * n))
        if self.microbatch and piece.size % self.microbatch:
            piece.microbatch = None
        return piece

    def groups(self, m: int, where: str = "`groups(m)`") -> Tree:
        """The batch in contiguous groups of m examples.

        Args:
            m: examples in a group, a divisor of n.
            where: what error messages call the option that m comes from.

        Returns:
            The batch with leaves [n, ...] reshaped to [n/m, m, ...]. `on(group)` is the loss on
            one of them, `piece(group, i, n // m)` the same with its own dropout key.

        Raises:
            ValueError: m does not divide n, or the batch is one device's part of a group.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> objective = curvax.Objective(lambda w, x: jnp.mean(w * x), jnp.ones((8, 3)))
            >>> objective.groups(2).shape
            (4, 2, 3)
        """
        validation.refuse_joined(self.joined)
        return microbatching.split(self.batch, self.size, m, where)

    def first(self, fraction: float) -> Objective:
        """The same loss on the first `fraction` of the batch.

        Args:
            fraction: in (0, 1]; round(fraction·n) examples, at least one.

        Returns:
            An `Objective` on these examples.

        Raises:
            ValueError: `microbatch` is smaller than their number and does not divide it.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> objective = curvax.Objective(lambda w, x: jnp.mean(w * x), jnp.ones(8))
            >>> objective.first(0.25).size
            2
        """
        validation.refuse_joined(self.joined)
        count = max(1, round(fraction * self.size))
        batch = jax.tree.map(lambda x: meshes.first(x, count), self.batch)
        if not self.microbatch or self.microbatch >= count:
            return pieces.changed(self, batch=batch, microbatch=None)
        where = f"`Objective(microbatch=)`, on a fraction {fraction} of the batch,"
        microbatching.check_divides(count, self.microbatch, where)
        return self.on(batch)

    def through(self, f: Callable[[Tree], Tree]) -> Objective:
        """The composition with a map of the parameters, θ ↦ L(f(θ)).

        Args:
            f: a differentiable function to the parameters that the loss takes.

        Returns:
            An `Objective` of the argument of `f`, on the same batch.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> objective = curvax.Objective(lambda w, x: jnp.mean(w * x), jnp.ones(8))
            >>> float(objective.through(jnp.exp)(0.0))
            1.0
        """
        half = "loss" if self.model is None else "model"
        inner = getattr(self, half)
        return pieces.changed(self, **{half: lambda params, *rest: inner(f(params), *rest)})

    def batch_weight(self) -> jax.Array | None:
        """The weight of this batch in a weighted mean over batches, groups or devices.

        Returns:
            The total weight of the examples, a scalar; None if the loss is not weighted, so that
            batches of equal size count equally.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> batch = {"label": jnp.arange(4), "mask": jnp.arange(4) < 3}
            >>> loss = curvax.categorical("label", mask="mask")
            >>> predict = lambda w, batch: jnp.outer(batch["label"], w)
            >>> float(curvax.Objective(loss, batch, model=predict).batch_weight())
            3.0
        """
        if self.joined:
            own = pieces.device_part(self).batch_weight()
            return None if own is None else axes.total(axes.vary(own, self.joined), self.joined)
        if isinstance(self.weight, str):
            weight = jnp.sum(self.batch[self.weight])
        elif self.weight is not None:
            weight = self.weight(self.batch)
        elif isinstance(self.loss, Likelihood) and self.loss.weighted:
            return self.loss.total_weight(self.batch)
        else:
            return None
        return jnp.asarray(weight, jnp.result_type(float))

    def __call__(self, params: Tree) -> jax.Array:
        """L(θ), a scalar in float32 or wider, without the aux.

        Can be differentiated by `jax.grad`: micro-batches are scanned with rematerialisation, in
        the memory of one. Under device axes use `value_and_grad` instead, since the derivative of a
        mean over devices means different things under `pmap` and `shard_map`.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> objective = curvax.Objective(lambda w, x: jnp.mean(w * x), jnp.arange(4.0))
            >>> float(objective(2.0))
            3.0
        """
        return evaluation.value(self, params)

    def value_and_grad(self, params: Tree) -> tuple[Any, Tree]:
        """The loss and its gradient, as `jax.value_and_grad(loss, has_aux=...)` would return them.

        Under a device axis both are those of this device's part of the batch: average them with
        `jax.lax.pmean` or, after the stages, with `pmean_updates`.

        The gradient is recorded by weak references in a gradient cache. Stages that compute the
        gradient anyway, together with a curvature product, then return their own, and the compiler
        removes the pass made here.

        Args:
            params: the point θ.

        Returns:
            (L(θ), ∇L(θ)), or ((L(θ), aux), ∇L(θ)) with `has_aux`. L is in float32 or wider, the
            gradient shaped and typed like `params` (see `scale` for the exception).

        Raises:
            ValueError: the aux of the whole batch cannot be computed from its micro-batches.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> objective = curvax.Objective(lambda w, x: jnp.mean((w - x) ** 2), jnp.arange(3.0))
            >>> value, gradient = objective.value_and_grad(jnp.array(4.0))
            >>> round(float(value), 3), round(float(gradient), 3)
            (9.667, 6.0)
        """
        (value, aux), grads = evaluation.value_aux_and_grad(self, params)
        evaluation.refuse_undecided(aux)
        self.gradients.store(params, grads, value, self.local_axes(params))
        return ((value, aux) if self.has_aux else value), grads

    def outputs(self, params: Tree) -> tuple[Tree, Any]:
        """The outputs z of the model for the whole batch, and its aux.

        Args:
            params: the point θ.

        Returns:
            (z, aux), where aux is None without `has_aux`.

        Raises:
            ValueError: the batch is one device's part of a group.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> predict = lambda w, batch: batch["x"] @ w
            >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.zeros((4, 2))}
            >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
            >>> objective.outputs(jnp.ones((3, 2)))[0].shape
            (4, 2)
        """
        validation.refuse_joined(self.joined)
        return evaluation.call(self, "model", params)

    def example_keys(self, key: jax.Array) -> jax.Array:
        """One key for each example: `key` folded with the example's number in the global batch.

        Random draws are then the same on any number of devices and for any `microbatch`.

        Args:
            key: a typed key.

        Returns:
            Keys, [n].

        Examples:
            >>> import jax, jax.numpy as jnp, curvax
            >>> objective = curvax.Objective(lambda w, x: jnp.mean(w * x), jnp.ones(8))
            >>> objective.example_keys(jax.random.key(0)).shape
            (8,)
        """
        number, _ = pieces.piece_number(self, pieces.batch_axes(self))
        first = number * self.size
        fold = lambda i, _: (jax.random.fold_in(key, first + i), None)
        return microbatching.stack_over_vmap(fold, self.groups(1), self.size)[0]

    def local_axes(self, params: Tree) -> frozenset[str]:
        """The device axes over which this loss differs from device to device.

        Args:
            params: the point θ; only its types are used.

        Returns:
            Names of axes bound by `pmap` or `shard_map`, empty under plain `jit`. Axes over which
            `per_group` has already averaged this loss are not among them.

        Raises:
            ValueError: the loss averages its own value over a device axis; or devices have
                different weights and exchange activations, as in synchronised batch norm.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> objective = curvax.Objective(lambda w, x: jnp.mean(w * x), jnp.ones(8))
            >>> objective.local_axes(1.0)
            frozenset()
        """
        if not axes.manual():
            return frozenset()
        kind = (axes.manual(), *map(jax.typeof, jax.tree.leaves(params)))
        if kind not in self.known_axes:
            self.known_axes[kind] = traced_axes(self, params) - set(self.joined)
        return self.known_axes[kind]

    def cached_gradient(self, params: Tree, updates: Tree) -> CachedGradient | None:
        """The cache entry of `updates`, if they are the gradient that `value_and_grad` returned.

        Args:
            params, updates: compared by identity, leaf by leaf; a cast of the gradient to a wider
                type, and a resharding, still count as the same gradient.

        Returns:
            A `CachedGradient` with `value` L(θ) and `local` device axes, or None.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> objective, w = curvax.Objective(lambda w: jnp.sum(w**2)), jnp.ones(2)
            >>> _, gradient = objective.value_and_grad(w)
            >>> float(objective.cached_gradient(w, gradient).value)
            2.0
            >>> objective.cached_gradient(w, 2 * gradient) is None
            True
        """
        return self.gradients.find(params, updates)

    def has_gradient_at(self, params: Tree) -> bool:
        """Whether `value_and_grad` was called at these parameters, compared by identity.

        Examples:
            >>> import jax.numpy as jnp, curvax
            >>> objective, w = curvax.Objective(lambda w: jnp.sum(w**2)), jnp.ones(2)
            >>> objective.has_gradient_at(w)
            False
        """
        return self.gradients.has(params)
