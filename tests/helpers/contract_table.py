"""The table of the contract: every stage and method, in a pipe that gives it what it needs."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import curvax as cx


def make_params(dtype: Any = jnp.float64) -> Any:
    kernel, bias = jax.random.normal(jax.random.key(0), (5, 2), dtype)[:4], jnp.ones(2, dtype) / 3
    return {"hidden": {"kernel": kernel}, "out": {"bias": bias}}


def make_batch(dtype: Any = jnp.float64) -> Any:
    x = jax.random.normal(jax.random.key(1), (8, 4), dtype)
    return {"x": x, "y": 1 + x[:, :2]}


def predict(params: Any, batch: Any) -> jax.Array:
    return jnp.tanh(batch["x"] @ params["hidden"]["kernel"]) + params["out"]["bias"][None, :]


def numbers(batch: Any) -> jax.Array:
    return jnp.arange(len(batch["x"]))


class Row(NamedTuple):
    """One entry of the table: a pipe around what is tested, and its injectable numbers."""

    build: Callable[..., cx.Stage]
    numbers: Mapping[str, Any] = MappingProxyType({})
    perturbs: bool = False
    """Warns of parameters in half precision."""
    differentiates: bool = True
    """Refuses integer parameters."""


def is_hidden(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, x: "hidden" in jax.tree_util.keystr(path), params)


def by_layer(params: Any) -> Any:
    return jax.tree.map(lambda hidden: "hidden" if hidden else "rest", is_hidden(params))


def half(params: Any) -> Any:
    return optax.EmptyState()


def halve(signal: cx.Signal, state: Any, params: Any, **extra: Any) -> Any:
    return signal._replace(updates=optax.tree.scale(0.5, signal.updates)), state


def like() -> cx.Objective:
    """The shapes of training, also for the hidden layer alone."""

    def model(params: Any, batch: Any) -> jax.Array:
        bias = params["out"]["bias"]
        return predict({**params, "out": {"bias": jnp.ones(2) if bias is None else bias}}, batch)

    return cx.Objective(cx.gaussian("y"), make_batch(), model=model)


def diagonal(key: Any = 0) -> cx.Stage:
    return cx.hutchinson_diag(key)


def divide() -> cx.Stage:
    return cx.ema_rms(0.9) | cx.scale_by_power(1.0, eps=0.1)


TABLE = {
    "hutchinson_diag": Row(lambda key: cx.hutchinson_diag(key, probes=2) | divide(), {"key": 3}),
    "spatial_average": Row(lambda: diagonal() | cx.spatial_average(2) | divide()),
    "ema_rms": Row(
        lambda decay: diagonal() | cx.ema_rms(decay) | cx.scale_by_power(1.0, eps=0.1),
        {"decay": 0.9},
    ),
    "every": Row(lambda k: cx.every(k, diagonal()) | divide(), {"k": 2}),
    "scale_by_power": Row(
        lambda power, eps, damping: (
            diagonal() | cx.ema_rms(0.9) | cx.scale_by_power(power, eps=eps, damping=damping)
        ),
        {"power": 0.7, "eps": 1e-3, "damping": 0.1},
    ),
    "sam_perturb": Row(
        lambda rho, every: cx.sam_perturb(rho, every=every), {"rho": 0.1, "every": 2}, perturbs=True
    ),
    "sam_perturb with auto_rho": Row(
        lambda: cx.sam_perturb(cx.auto_rho(0.3)) | optax.sgd(0.1), perturbs=True
    ),
    "sam_perturb at random": Row(
        lambda key: cx.sam_perturb(0.1, ascent=cx.random_direction(key), steps=2),
        {"key": 3},
        perturbs=True,
    ),
    "sam_perturb along earlier gradients": Row(
        lambda rho, decay: cx.sam_perturb(rho, ascent=cx.momentum(decay), sync_over="batch"),
        {"rho": 0.1, "decay": 0.5},
        perturbs=True,
    ),
    "sam_perturb on a fraction": Row(
        lambda rho: cx.sam_perturb(rho, fraction=0.5), {"rho": 0.1}, perturbs=True
    ),
    "sam_perturb to second order": Row(
        lambda rho: cx.sam_perturb(rho, p=3, second_order=True), {"rho": 0.1}, perturbs=True
    ),
    "gsam_project": Row(
        lambda alpha: cx.sam_perturb(0.1) | cx.gsam_project(alpha), {"alpha": 0.4}, perturbs=True
    ),
    "penalize_gap": Row(
        lambda lam: cx.sam_perturb(0.1) | cx.penalize_gap(lam), {"lam": 0.4}, perturbs=True
    ),
    "keep_orthogonal": Row(
        lambda alpha: cx.sam_perturb(0.1, every=2) | cx.keep_orthogonal(alpha),
        {"alpha": 0.4},
        perturbs=True,
    ),
    "per_group": Row(
        lambda rho: cx.per_group(4, cx.sam_perturb(rho) | cx.gsam_project(0.4)),
        {"rho": 0.1},
        perturbs=True,
    ),
    "pmean_updates": Row(
        lambda rho: cx.sam_perturb(rho) | cx.pmean_updates("batch"), {"rho": 0.1}, perturbs=True
    ),
    "restrict": Row(
        lambda rho: cx.restrict(cx.sam_perturb(rho), is_hidden),
        {"rho": 0.1},
        perturbs=True,
        differentiates=False,
    ),
    "partition": Row(
        lambda rate: cx.partition(
            {"hidden": diagonal() | divide(), "rest": optax.adagrad(rate)}, by_layer
        ),
        {"rate": 0.1},
        differentiates=False,
    ),
    "record": Row(
        lambda: cx.record(size=lambda signal, params: optax.tree.norm(signal.updates)),
        differentiates=False,
    ),
    "stage": Row(lambda: cx.stage(half, halve), differentiates=False),
    "pipe": Row(
        lambda rate: cx.pipe(optax.clip(0.1), optax.sgd(rate)), {"rate": 0.1}, differentiates=False
    ),
    "adahessian": Row(
        lambda rate: cx.adahessian(rate, block=2, weight_decay=0.1, every=2), {"rate": 0.15}
    ),
    "sam": Row(lambda rho: cx.sam(optax.sgd(0.1, 0.9), rho), {"rho": 0.1}, perturbs=True),
    "gsam": Row(
        lambda rho, alpha: cx.gsam(optax.adamw(0.1), rho, alpha, ascent=cx.asam(0.01)),
        {"rho": 0.1, "alpha": 0.4},
        perturbs=True,
    ),
    "look_sam": Row(
        lambda rho, every: cx.look_sam(optax.adabelief(0.1), rho, every=every),
        {"rho": 0.1, "every": 2},
        perturbs=True,
    ),
    "entropy_sgd": Row(
        lambda scope, decay, momentum: cx.entropy_sgd(
            optax.adamw(0.1), scope, steps=4, decay=decay, momentum=momentum, split_batch=True
        ),
        {"scope": 0.3, "decay": 0.5, "momentum": 0.8},
    ),
    "squared_gradient | ema_mean | accumulate": Row(
        lambda decay: (
            cx.squared_gradient()
            | cx.ema_mean(decay, lag=1)
            | cx.accumulate(0.1)
            | cx.scale_by_power(0.5)
        ),
        {"decay": 0.9},
        differentiates=False,
    ),
    "empirical_fisher_diag | clip_by_diagonal": Row(
        lambda gamma: cx.empirical_fisher_diag() | cx.clip_by_diagonal(gamma, eps=0.1),
        {"gamma": 0.5},
    ),
    "gauss_newton_diag": Row(
        lambda key: cx.gauss_newton_diag(key, probes=2) | divide(), {"key": 3}
    ),
    "fisher_diag": Row(lambda key: cx.fisher_diag(key, shards=2) | divide(), {"key": 3}),
    "exact_diag": Row(lambda: cx.exact_diag("fisher") | divide()),
    "hessian_matvec | damp | solve": Row(
        lambda damping: cx.hessian_matvec() | cx.damp(damping) | cx.solve(cx.steihaug(0.5, 3)),
        {"damping": 0.3},
    ),
    "gauss_newton_matvec": Row(
        lambda damping: cx.gauss_newton_matvec() | cx.damp(damping) | cx.solve(cx.dense()),
        {"damping": 0.3},
    ),
    "fisher_matvec | trust_region": Row(
        lambda radius: (
            cx.fisher_matvec(samples=2)
            | cx.damp(0.3)
            | cx.solve(cx.cg(3, warm_start=0.5))
            | cx.trust_region(radius)
        ),
        {"radius": 0.1},
    ),
    "trajectory_loss": Row(
        lambda strength: cx.trajectory_loss(8, 2, strength=strength, lag=1, index=numbers),
        {"strength": 0.3},
    ),
    "local_entropy": Row(
        lambda scope, rate, noise: cx.local_entropy(scope, steps=3, rate=rate, noise=noise),
        {"scope": 0.3, "rate": 0.1, "noise": 0.01},
    ),
    "empirical_fisher_matvec": Row(
        lambda damping: cx.empirical_fisher_matvec() | cx.damp(damping) | cx.solve(cx.row_space()),
        {"damping": 0.3},
    ),
    "quadratic_step": Row(lambda: cx.fisher_matvec() | cx.damp(0.3) | cx.quadratic_step()),
    "levenberg_marquardt": Row(
        lambda damping: cx.levenberg_marquardt(
            cx.fisher_matvec() | cx.damp() | cx.solve(cx.cg(3)) | optax.sgd(0.5, 0.9), damping
        ),
        {"damping": 0.3},
    ),
    "sam_perturb in the Fisher metric": Row(
        lambda rho: cx.sam_perturb(rho, ascent=cx.fisher_ascent(0.3, solver=cx.cg(3))),
        {"rho": 0.1},
        perturbs=True,
    ),
    "fisher_kronecker | ema_mean | solve": Row(
        lambda key, decay, damping: (
            cx.every(2, cx.fisher_kronecker(like(), key) | cx.ema_mean(decay))
            | cx.damp(damping)
            | cx.solve(cx.kronecker(3, style="heuristic"))
        ),
        {"key": 3, "decay": 0.9, "damping": 0.3},
    ),
    "gauss_newton_kronecker": Row(
        lambda power: cx.gauss_newton_kronecker() | cx.scale_by_power(power, damping=0.3, eps=0.1),
        {"power": 0.5},
    ),
    "empirical_fisher_kronecker | accumulate": Row(
        lambda radius: (
            cx.empirical_fisher_kronecker(like())
            | cx.accumulate()
            | cx.damp(0.3)
            | cx.solve(cx.kronecker())
            | cx.trust_region(radius)
        ),
        {"radius": 0.1},
    ),
    "gradient_kronecker": Row(
        lambda decay, damping: (
            cx.gradient_kronecker()
            | cx.ema_mean(decay)
            | cx.damp(damping)
            | cx.solve(cx.kronecker(2))
        ),
        {"decay": 0.9, "damping": 0.3},
    ),
    "shampoo": Row(
        lambda rate: cx.shampoo(rate, damping=0.1, eps=0.1, momentum=0.9),
        {"rate": 0.1},
    ),
    "fisher_kronecker | in_eigenbasis | fisher_eigenvalues": Row(
        lambda key, decay: (
            cx.fisher_kronecker(like(), key)
            | cx.in_eigenbasis(cx.fisher_eigenvalues(key) | cx.ema_mean(decay), every=2)
            | cx.damp(0.3)
            | cx.solve(cx.kronecker())
        ),
        {"key": 3, "decay": 0.9},
    ),
    "soap": Row(lambda rate: cx.soap(rate, eps=0.1, every=2), {"rate": 0.1}),
    "ekfac": Row(
        lambda rate: cx.ekfac(like(), rate, damping=0.3, momentum=0.9, bases_every=2),
        {"rate": 0.1},
    ),
    "kfac": Row(
        lambda rate: cx.kfac(like(), rate, damping=0.3, momentum=0.9, radius=0.5), {"rate": 0.1}
    ),
    "kfac with adapted damping": Row(
        lambda damping: cx.kfac(like(), damping=damping, momentum="quadratic", adaptive=True),
        {"damping": 0.3},
    ),
    "natural_gradient": Row(
        lambda rate: cx.natural_gradient(rate, damping=0.3, solver=cx.cg(3), momentum=0.9),
        {"rate": 0.1},
    ),
    "gauss_newton": Row(
        lambda rate: cx.gauss_newton(rate, damping=0.3, solver=cx.cg(3)), {"rate": 0.1}
    ),
    "hessian_free": Row(
        lambda damping: cx.hessian_free(
            damping=damping, solver=cx.cg(3, warm_start=0.9, backtrack=True)
        ),
        {"damping": 0.3},
    ),
    "newton_cg": Row(lambda rate: cx.newton_cg(rate, damping=0.3, solver=cx.cg(3)), {"rate": 0.1}),
    "diagonal_natural_gradient": Row(
        lambda rate: cx.diagonal_natural_gradient(rate, damping=0.1, every=2),
        {"rate": 0.1},
    ),
    "sophia_h": Row(lambda rate: cx.sophia_h(rate, every=2), {"rate": 0.1}),
    "sophia_g": Row(lambda rate: cx.sophia_g(rate, every=2), {"rate": 0.1}),
}
