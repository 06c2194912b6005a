"""The loss as the stages see it: a callable of the parameters that can say more than its value.

A stage reaches the loss only through `value_and_grad` and the products of `curvax.curvature`; the
batch behind it can be swapped (`on`), cut into groups (`groups`) or walked through in micro-batches
(`microbatch=`), and each piece folds its own number into the dropout key.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree, differentiated
from curvax.devices import axes, meshes
from curvax.likelihoods import Likelihood
from curvax.objective import microbatching, reductions, validation
from curvax.objective.aux_values import Pass, Reductions, Undecided, check_reductions, in_pieces
from curvax.objective.gradient_cache import CachedGradient, GradientCache


class Objective:
    """A loss of the parameters over a batch, for `tx.update(grads, state, params, value_fn=...)`.

        L(θ) = 1/n Σᵢ ℓ(θ, xᵢ)

    Args:
        loss: `loss(params, batch) -> scalar`, a mean over the leading axis of `batch`; or, with
            `model`, `loss(outputs, batch) -> scalar`; or, without a batch, `loss(params)`.
        batch: a pytree of arrays with one leading axis of examples.
        model: `model(params, batch) -> outputs`, where the two halves of the loss must be seen
            apart (Gauss-Newton, Fisher). The loss may then be a likelihood: `categorical`,
            `bernoulli`, `gaussian`, `poisson`.
        has_aux: the loss returns `(scalar, aux)`; with `model`, the model returns
            `(outputs, aux)`. In Flax the aux is the new model state.
        key: a typed PRNG key. The loss (or the model) is then called with a third argument, a key
            that is the same in every pass over the same examples, and different for each group,
            micro-batch and device.
        microbatch: examples per micro-batch. Loss, gradient and products are accumulated in
            float32 over scanned micro-batches, with the memory of one. The aux is the whole
            batch's: what the loss sums over the examples is summed over micro-batches too, of a
            maximum it is the largest, values of examples are put together, and what the program
            makes of them follows once (means, quotients of sums, an F score). Of running averages
            that are no means, such as batch norm's variance, it is the mean of the micro-batches',
            counters are those after one pass, and the states that Flax's fp8 layers overwrite with
            their gradients are the largest. What does not follow (a median, a deviation, `[0]`) is
            an error unless `reduce_aux` names it. On a mesh of explicit axes every device works on
            its part of each micro-batch, to which the batch is moved once.
        weight: `weight(batch) -> scalar`, or the name of an entry of the batch whose sum it is,
            where the loss is a weighted mean (the number of unmasked tokens, say). Micro-batches,
            groups and devices are then averaged by weight. A likelihood with a mask or weights
            brings its own.
        scale: what the loss is multiplied by in every pass that is differentiated (both gradients
            of SAM, curvature products, gradients of examples), for models that compute in float16:
            a number or a traced scalar, such as the `scale` of Flax's `DynamicScale`. Results are
            divided by it in float32 or wider, which they keep where parameters are narrower; loss
            and figures are never scaled.
        reduce_aux: how the aux of micro-batches and groups is reduced: "mean" (by weight), "sum",
            "max", "min", "last" or "concat" (along the first axis), for all of it or as a tree
            prefix, or a callable of the path; None where the loss tells.

    With Flax's `DynamicScale`, a scale too large shows in the updates, since the second pass may
    overflow where the first did not: skip that step and lower the scale. (`optax.apply_if_finite`
    reads the gradient it is given: put it behind the stages, `sam(apply_if_finite(base, 3))`.)

        objective = Objective(loss, batch, scale=dynamic_scale.scale)
        new_scale, finite, _, grads = dynamic_scale.value_and_grad(objective)(params)
        updates, new_state = tx.update(grads, state, params, value_fn=objective)
        finite &= jnp.isfinite(optax.tree.norm(updates))

    Raises:
        ValueError: `microbatch` does not divide the batch, or options need a batch and have none,
            or a likelihood has no `model`, or `scale` is not positive; no such reduction
            of the aux.
        TypeError: `key` is no typed key, or `scale` no scalar.
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
        self._gradients = GradientCache()
        self._local: dict[Any, frozenset[str]] = {}
        self._part: tuple[Any, int] = (0, 1)
        self._whole: tuple[Any, ...] | None = None
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
        """The number of examples in the batch (here: on this device, under an axis).

        Raises:
            ValueError: there is no batch, or its leaves disagree on the leading axis.
        """
        sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(self.batch)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                "The batch of an `Objective` is a pytree of arrays that share one leading axis of "
                f"examples. Got shapes {[jnp.shape(x) for x in jax.tree.leaves(self.batch)]}. "
                "A plain callable has no batch: write `Objective(loss, batch)` with "
                "`loss(params, batch)`."
            )
        return sizes.pop()[0]

    def on(self, batch: Tree) -> Objective:
        """The same loss on another batch (a pytree with one leading axis of examples; of a group of
        devices, each one's part of it)."""
        return self._changed(batch=batch)

    def piece(self, batch: Tree, i: Any, n: int) -> Objective:
        """The loss on the i-th of n contiguous pieces of this batch.

        Its dropout key is folded with its number among the pieces of the global batch. A piece that
        micro-batches do not divide is taken whole.
        """
        j, m = self._part
        piece = self._changed(batch=batch, _part=(j * n + i, m * n))
        if self.microbatch and piece.size % self.microbatch:
            piece.microbatch = None
        return piece

    def _as_group(self, over: tuple[axes.Along, ...]) -> Objective:
        """A loss of groups: along bound device axes, whose devices make one, it is their mean.

        Value, gradient, Hessian and weight are the group's. What looks into the batch is refused:
        the examples, the outputs and the parts that a device sees are its own.
        """
        return self._changed(grouped=True, joined=over)

    def _device_part(self) -> Objective:
        """This device's own loss, where it is a part of a group."""
        return self._changed(joined=()) if self.joined else self

    def _group_mean(self, tree: Tree) -> Tree:
        """The mean over the devices of a group, by weight, of what each found in its own loss."""
        return axes.mean(tree, self.joined, self._device_part().batch_weight())

    def _changed(self, **fields: Any) -> Objective:
        """A copy that remembers nothing."""
        other = copy.copy(self)
        other._gradients, other._local, other._whole = GradientCache(), {}, None
        vars(other).update(fields)
        return other

    def groups(self, m: int, where: str = "`groups(m)`") -> Tree:
        """The batch in contiguous groups of m examples; errors say `where`.

        Returns:
            The batch's tree, leaves [n, ...] as [n/m, m, ...]; `on(group)` is the loss on one.

        Raises:
            ValueError: m does not divide the batch, or that is a part of a group.
        """
        validation.refuse_joined(self.joined)
        return microbatching.split(self.batch, self.size, m, where)

    def first(self, fraction: float) -> Objective:
        """The same loss on the first `fraction` of the batch (at least one example)."""
        validation.refuse_joined(self.joined)
        count = max(1, round(fraction * self.size))
        batch = jax.tree.map(lambda x: meshes.first(x, count), self.batch)
        if not self.microbatch or self.microbatch >= count:
            return self._changed(batch=batch, microbatch=None)
        where = f"`Objective(microbatch=)`, on a fraction {fraction} of the batch,"
        microbatching.check_divides(count, self.microbatch, where)
        return self.on(batch)

    def through(self, f: Callable[[Tree], Tree]) -> Objective:
        """The objective composed with a map of parameters: θ ↦ L(f(θ))."""
        half = "loss" if self.model is None else "model"
        inner = getattr(self, half)
        return self._changed(**{half: lambda params, *rest: inner(f(params), *rest)})

    def batch_weight(self) -> jax.Array | None:
        """The weight of this loss in a mean of means, or None where all count alike."""
        own = self._own_weight()
        if own is None or not self.joined:
            return own
        return axes.total(axes.vary(own, self.joined), self.joined)

    def _own_weight(self) -> jax.Array | None:
        if self.weight is None:
            if isinstance(self.loss, Likelihood) and self.loss.weighted:
                return self.loss.total_weight(self.batch)
            return None
        if isinstance(self.weight, str):
            weight = jnp.sum(self.batch[self.weight])
        else:
            weight = self.weight(self.batch)
        return jnp.asarray(weight, jnp.result_type(float))

    def __call__(self, params: Tree) -> jax.Array:
        """L(θ), a scalar in float32 or wider. Safe for anybody's autodiff: the micro-batches are
        scanned with checkpointed bodies. Under device axes take `value_and_grad`, since JAX's own
        derivative of a mean over devices depends on how they are mapped."""
        own = lambda part: lambda p: part._evaluate(p)[0]
        value = self._device_part()._microbatch_mean(
            lambda part: (jax.checkpoint(own(part)) if self.microbatch else own(part))(params),
            aux=False,
        )
        return self._group_mean(value)

    def _device_mean(self, params: Tree, over: tuple[axes.Along, ...]) -> jax.Array:
        """L(θ), the mean over bound device axes, at a precision at which differences count."""
        with jax.default_matmul_precision("highest"):
            return axes.mean(self(params), over, self.batch_weight())

    def value_and_grad(self, params: Tree) -> tuple[Any, Tree]:
        """(L(θ) or (L(θ), aux), ∇L(θ)), local to this device under an axis.

        The objective remembers by weak reference which gradient it gave for which parameters, so
        that a curvature estimator can pass on its own copy and the compiler drop this one.
        """
        (value, aux), grads = self._value_aux_and_grad(params)
        if isinstance(aux, Undecided):
            raise ValueError(aux.message)
        self._remember(params, grads, value, self.local_axes(params))
        return ((value, aux) if self.has_aux else value), grads

    def _remember(
        self, params: Tree, grads: Tree, value: jax.Array | None, local: frozenset[str]
    ) -> None:
        """Takes note of this loss's own gradient at parameters, for `gave`."""
        self._gradients.store(params, grads, value, local)

    def _value_aux_and_grad(self, params: Tree) -> tuple[tuple[jax.Array, Any], Tree]:
        """((L(θ), aux), ∇L(θ)), where aux is None without `has_aux`."""
        here = axes.vary(params, self.local_axes(params) | set(self.joined))
        own = self._device_part()
        (value, aux), grads = own._microbatch_mean(lambda part: own._share(part, here))
        value, grads = self._group_mean((value, grads))
        return (value, aux), grads

    def _share(self, part: Objective, params: Tree) -> tuple[tuple[jax.Array, Any], Tree]:
        """((L, aux), ∇L) of a part of the batch.

        Where states are overwritten by their gradients (fp8's scales, which follow the largest
        entries that flow back), what flows back is that of the whole batch's mean.
        """
        if part is self or not trees.has_overwritten(params):
            return part._differentiated(params)
        share: Any = part.size / self.size
        if (own := part.batch_weight()) is not None and (total := self.batch_weight()) is not None:
            share = trees.ratio(own, total)
        return part._differentiated(params, jnp.asarray(share))

    def _differentiated(
        self, params: Tree, share: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, Any], Tree]:
        """((L, aux), ∇L) in one piece, `scale` and its `share` of a mean in what flows back."""
        if self.scale is None and share is None:
            return differentiated(self.evaluate, params)

        def scaled(params: Tree) -> tuple[jax.Array, Any]:
            value, aux = self._evaluate(params)
            return self._scaled(value if share is None else share * value), (value, aux)

        def back(path: Any, g: jax.Array) -> jax.Array:
            if trees.is_overwritten(path):
                return g
            g = self._unscaled(g)
            return g if share is None else trees.ratio(trees.widen(g), share).astype(g.dtype)

        (_, out), grads = differentiated(scaled, params)
        return out, trees.map_with_path(back, grads)

    def _scaled(self, tree: Tree) -> Tree:
        """What is to be pulled back, times `scale`, in float32 or wider; itself without a scale."""
        if self.scale is None:
            return tree
        return trees.scale(self.scale, trees.wide(tree))

    def _unscaled(self, tree: Tree) -> Tree:
        """What was pulled back from something scaled, in float32 or wider."""
        if self.scale is None:
            return tree
        by = lambda x: (x / self.scale).astype(x.dtype)
        return jax.tree.map(by, trees.wide(tree))

    def _evaluate(self, params: Tree) -> tuple[jax.Array, Any]:
        """(L(θ), aux) of the whole batch in one piece."""
        if self.model is not None:
            outputs, aux = self.outputs(params)
            return self._loss_of(outputs), aux
        value, aux = self._called("loss", params)
        return validation.scalar(value, self.has_aux), aux

    def outputs(self, params: Tree) -> tuple[Tree, Any]:
        """(z, aux): what the model, the first half of the loss, returns for the whole batch."""
        validation.refuse_joined(self.joined)
        return self._called("model", params)

    def _called(self, half: str, params: Tree) -> tuple[Any, Any]:
        """(what it returns, its aux), of the loss or the model; of a piece, what of the aux is
        reduced over all pieces."""
        f = getattr(self, half)
        rest = () if self.batch is None else (self.batch,)
        if not self.has_aux:
            return validation.called(f, params, *rest, *self._keys()), None
        both = lambda *args: validation.pair(validation.called(f, *args), half)
        if self._whole is None:
            return both(params, *rest, *self._keys())
        here = Pass(both, params, (*rest, *self._keys()), self._whole)
        return in_pieces(here, self.reduce_aux)

    def _whole_batch(self) -> tuple[Any, ...]:
        """(batch, *keys) of the batch of which this is a piece, or of this one."""
        return self._whole or (self.batch, *self._keys())

    def _as_piece_of(self, whole: tuple[Any, ...]) -> Objective:
        """The same loss, whose aux is reduced over all pieces of a whole; see `finished`."""
        return self._changed(_whole=whole) if self.has_aux else self

    def _loss_of(self, outputs: Tree) -> jax.Array:
        """L of outputs, the second half of the loss, a scalar in float32 or wider."""
        return validation.scalar(self.loss(outputs, self.batch))

    def _microbatch_mean(self, f: Callable[..., Tree], *beside: Tree, aux: bool = True) -> Tree:
        """The mean over micro-batches of `f(the objective on one of them)`, by weight where there
        is one; `f(self)` without micro-batches. Floating leaves are accumulated in float32, others
        are the last one's; the aux is that of the whole batch.

        Args:
            f: `f(part, *beside)`.
            beside: trees with a leading axis of examples, cut like the batch.
            aux: False where f hands on none.

        Raises:
            ValueError: the batch is a device's part of a group.
        """
        validation.refuse_joined(self.joined)
        if not self.microbatch or self.microbatch == self.size:
            return f(self, *beside)
        count, whole = self.size // self.microbatch, self._whole_batch()

        def piece(i: jax.Array, pieces: Tree) -> tuple[Tree, jax.Array | None]:
            batch, *rest = pieces
            part = self.piece(batch, i, count)
            part = part._as_piece_of(whole) if aux else part
            return f(part, *rest), part.batch_weight()

        where = "`Objective(microbatch=)`"
        pieces = microbatching.split((self.batch, *beside), self.size, self.microbatch, where)
        found = microbatching.mean_over_scan(piece, pieces, count)
        # Of a piece of a larger whole, the pieces of the whole are reduced first.
        return found if self._whole else microbatching.finished(found)

    def _map_examples(self, f: Callable[..., Tree], *beside: Tree) -> tuple[Tree, jax.Array | None]:
        """`f(the objective on one example, *beside)`, all at once.

        Returns:
            Its leaves, stacked along a new first axis, and the weight of each example where there
            is one. A dropout key is folded with the example's number.
        """

        def one(i: jax.Array, batch: Tree, *beside: Tree) -> tuple[Tree, jax.Array | None]:
            part = self.piece(batch, i, self.size)
            return f(part, *beside), part.batch_weight()

        return microbatching.stack_over_vmap(one, self.groups(1), self.size, *beside)

    def example_keys(self, key: jax.Array) -> jax.Array:
        """A key for each example, [n]: `key` folded with the example's number in the global batch,
        so that draws are the same on any number of devices and in micro-batches of any size."""
        number, _ = self._piece_number(self._batch_axes())
        first = number * self.size
        fold = lambda i, _: (jax.random.fold_in(key, first + i), None)
        return microbatching.stack_over_vmap(fold, self.groups(1), self.size)[0]

    def local_axes(self, params: Tree) -> frozenset[str]:
        """The device axes over which this loss is each device's own, or its group's.

        Raises:
            ValueError: the loss averages its own value over a device axis, or activations where
            devices have weights.
        """
        if not axes.manual():
            return frozenset()
        kind = (axes.manual(), *map(jax.typeof, jax.tree.leaves(params)))
        if kind not in self._local:
            self._local[kind] = self._traced_axes(params) - set(self.joined)
        return self._local[kind]

    def _traced_axes(self, params: Tree) -> frozenset[str]:
        own = self._device_part()
        loss = lambda p: own._microbatch_mean(lambda part: part._evaluate(p)[0], aux=False)
        traced = jax.make_jaxpr(loss)(params)
        typed = axes.tracked()
        suspects = axes.varying(self.batch) if typed and self.batch is not None else axes.manual()
        reductions.refuse_reduced_output(traced, tuple(suspects))
        local = axes.varying_of(traced.out_avals[0]) if typed else frozenset(axes.manual())
        weight = self._own_weight()
        if weight is not None:
            here = axes.vary(params, local)
            reductions.refuse_shared_activations(loss, here, self._axes_of_weights(weight))
        return local

    def _axes_of_weights(self, weight: jax.Array) -> list[set[str]]:
        """Sets of device axes over which weights differ, as far as is known."""
        if axes.tracked():
            return [{axis} for axis in axes.varying(weight)]
        # Of several axes without types, one may only split the model.
        return [set(axes.manual()), *({axis} for axis in self.joined if isinstance(axis, str))]

    def cached_gradient(self, params: Tree, updates: Tree) -> CachedGradient | None:
        """The record of `updates` as this objective's own gradient at `params`, if they are."""
        return self._gradients.find(params, updates)

    def has_gradient_at(self, params: Tree) -> bool:
        """Whether `value_and_grad` was called at these very parameters."""
        return self._gradients.has(params)

    def _inherit_gradients(
        self, outer: Objective, at: tuple[Tree, Tree], here: tuple[Tree, Tree]
    ) -> Objective:
        """This objective, with what another knows of a gradient in other forms of the parameters.

        Args:
            outer: the other one.
            at: (parameters, updates) as they are there.
            here: the same (parameters, updates) as they are here.
        """
        if (given := outer.cached_gradient(*at)) is not None:
            self._remember(*here, given.value, given.local)
        elif outer.has_gradient_at(at[0]):
            # Another gradient than these updates.
            self._remember(here[0], None, None, frozenset())
        return self

    def _shard_number(self, local: frozenset[str]) -> tuple[Any, int]:
        """(i, n): what this loss is the mean over is the i-th of n contiguous pieces of the global
        batch."""
        number, count = self._piece_number(local)
        rows = (part for part in self.joined if isinstance(part, axes.Neighbours))
        together = math.prod(row.size for row in rows if row.axis in local)
        return number // together, count // together

    def _piece_number(self, local: frozenset[str]) -> tuple[Any, int]:
        """The same of this device's batch, which may be a part of a group."""
        device, devices = axes.index_and_size(tuple(a for a in axes.manual() if a in local))
        part, parts = self._part
        return device * parts + part, devices * parts

    def _batch_axes(self) -> frozenset[str]:
        """The device axes over which the batch is each device's own."""
        return axes.varying(self.batch) if axes.tracked() else frozenset(axes.manual())

    def _keys(self) -> tuple[jax.Array, ...]:
        """The key of this pass, if there is one."""
        if self.key is None:
            return ()
        number, count = self._piece_number(self._batch_axes())
        return (jax.random.fold_in(self.key, number) if count > 1 else self.key,)
