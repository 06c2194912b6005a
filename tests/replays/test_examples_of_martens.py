"""Martens' examples: convergence with the Fisher matrix, invariance, and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from small_problems import flat, net, net_batch, net_params, quick_jit

import curvax as cx

# -- one example, f(θ) = θ, h = ½θ² (section 11.1) -----------------------------------------------


def descend(tx, theta, steps):
    """θ₀ … θ_steps on the one example of the paper."""
    batch = {"x": jnp.ones((1, 1)), "y": jnp.zeros((1, 1))}
    model = lambda theta, batch: theta * batch["x"]
    objective = cx.Objective(cx.gaussian("y"), batch, model=model)

    def step(carry, _):
        theta, state = carry
        _, grads = objective.value_and_grad(theta)
        updates, state = tx.update(grads, state, theta, value_fn=objective)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta

    start = jnp.asarray(theta)
    _, path = quick_jit(lambda t: jax.lax.scan(step, (t, tx.init(t)), length=steps))(start)
    return np.concatenate([start[None], path])


@pytest.mark.parametrize("alpha", [0.1, 0.7, 1.0, 1.9])
def test_natural_gradient_converges_linearly_at_any_fixed_step(alpha):
    path = descend(cx.natural_gradient(alpha, damping=0.0, solver=cx.dense()), 1.5, 30)
    np.testing.assert_allclose(path, 1.5 * (1 - alpha) ** np.arange(31), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("xi", [0.5, 0.75, 1.0])
def test_empirical_fisher_converges_at_no_fixed_step(xi):
    alpha, steps = 0.1, 3000
    tx = cx.empirical_fisher_diag() | cx.scale_by_power(xi, eps=0.0) | optax.sgd(alpha)
    path = descend(tx, 1.5, steps)
    follow = (1 - alpha * np.abs(path[:-1]) ** (-2 * xi)) * path[:-1]
    np.testing.assert_allclose(path[1:], follow, rtol=1e-9, atol=1e-12)
    # θ moves away from 0 wherever α|θ|^(-2ξ) > 2, so it comes back to that distance for ever.
    edge = (alpha / 2) ** (1 / (2 * xi))
    assert np.abs(path[-500:]).max() > 0.9 * edge


@pytest.mark.parametrize("xi", [0.5, 0.75])
def test_empirical_fisher_converges_as_slowly_as_its_steps_vanish(xi):
    schedule = lambda k: 0.5 / (k + 1)
    tx = cx.empirical_fisher_diag() | cx.scale_by_power(xi, eps=0.0) | optax.sgd(schedule)
    # With ξ = ½ steps are signed, and θ is exactly 0 after 3537 of them: a sum of ±1/2k.
    path = np.abs(descend(tx, 1.5, 2000))
    edge = lambda k: (schedule(k) / 2) ** (1 / (2 * xi))
    assert path[-200:].max() > 0.3 * edge(2000)
    assert path[-200:].max() < 0.06


# -- invariance ----------------------------------------------------------------------------------


def regular():
    """A net whose Fisher matrix and Hessian are regular: more outputs than parameters."""
    batch = net_batch(48)
    return net_params(), cx.Objective(cx.gaussian("y"), batch, model=net)


def moved(tx, params, value_fn):
    """The change of the parameters in one step, flat."""

    @quick_jit
    def step(params):
        _, grads = value_fn.value_and_grad(params)
        return tx.update(grads, tx.init(params), params, value_fn=value_fn)[0]

    return flat(step(params))


def difference(tx, f, phi):
    """‖Δθ - Δθ by way of φ‖ / ‖Δθ‖, where θ = f(φ)."""
    params, value_fn = regular()
    unravel = ravel_pytree(params)[1]
    through = value_fn.through(lambda phi: unravel(f(phi)))
    theta = unravel(f(phi))
    own = moved(tx, theta, value_fn)
    other = np.asarray(f(phi + moved(tx, phi, through)) - f(phi))
    return np.linalg.norm(own - other) / np.linalg.norm(own)


NATURAL = lambda rate=0.1, lam=0.0: cx.natural_gradient(rate, damping=lam, solver=cx.dense())
NEWTON = lambda rate=0.1: cx.newton_cg(rate, solver=cx.dense())


def affine():
    size = flat(net_params()).size
    keys = jax.random.split(jax.random.key(3))
    matrix = jnp.eye(size) + 0.3 * jax.random.normal(keys[0], (size, size))
    shift = jax.random.normal(keys[1], (size,))
    f = lambda phi: matrix @ phi + shift
    phi = jnp.linalg.solve(matrix, jnp.asarray(flat(net_params())) - shift)
    return f, phi


def test_natural_gradient_and_newton_are_invariant_to_affine_reparameterisation():
    f, phi = affine()
    assert difference(NATURAL(), f, phi) < 1e-8
    assert difference(NEWTON(), f, phi) < 1e-8


def test_gradient_descent_and_damped_natural_gradient_are_not_invariant():
    f, phi = affine()
    assert difference(optax.sgd(0.1) | cx.record(), f, phi) > 0.3
    assert difference(NATURAL(lam=0.1), f, phi) > 0.05


def cubic():
    """θ = φ + 0.3 φ³, entry by entry, and the φ of the net's own parameters."""
    f = lambda phi: phi + 0.3 * phi**3
    theta = flat(net_params())
    phi = np.array([np.roots([0.3, 0, 1, -t]) for t in theta])
    real = phi[np.arange(len(theta)), np.abs(phi.imag).argmin(axis=1)].real
    return f, jnp.asarray(real)


def test_natural_gradient_is_invariant_to_any_smooth_map_in_the_limit_of_small_steps():
    """Its difference falls with the step; Newton's stays, since ∇² is no tensor."""
    f, phi = cubic()
    rates = (1e-1, 1e-2, 1e-3)
    natural = np.array([difference(NATURAL(rate), f, phi) for rate in rates])
    newton = np.array([difference(NEWTON(rate), f, phi) for rate in rates])
    np.testing.assert_allclose(natural[:-1] / natural[1:], 10, rtol=0.3)
    assert newton.min() > 0.1
    np.testing.assert_allclose(newton[1] / newton[2], 1, rtol=0.2)


# -- a noisy quadratic (section 14) --------------------------------------------------------------

SIZE, BATCH, REPLICAS = 3, 4, 4000
HESSIAN = np.array([[3.0, 0.5, 0.0], [0.5, 1.0, -0.2], [0.0, -0.2, 0.3]])


def noisy():
    """h = E ½‖R θ - y‖², RᵀR = H, y ~ N(0, I): gradients have mean Hθ and covariance H / n."""
    root = jnp.asarray(np.linalg.cholesky(HESSIAN).T)
    model = lambda theta, batch: jnp.einsum("ij,j->i", root, theta)[None] + 0 * batch["y"]
    return lambda batch: cx.Objective(cx.gaussian("y"), batch, model=model)


def spread(tx, steps, *, averaged=False):
    """E[θ θᵀ] after some steps, over replicas that see batches of their own."""
    make = noisy()

    def run(key):
        def step(carry, key):
            theta, state, total = carry
            objective = make({"y": jax.random.normal(key, (BATCH, SIZE))})
            _, grads = objective.value_and_grad(theta)
            updates, state = tx.update(grads, state, theta, value_fn=objective)
            theta = optax.apply_updates(theta, updates)
            return (theta, state, total + theta), None

        start = jnp.zeros(SIZE)
        keys = jax.random.split(key, steps)
        (theta, _, total), _ = jax.lax.scan(step, (start, tx.init(start), start), keys)
        return total / steps if averaged else theta

    last = np.asarray(quick_jit(jax.vmap(run))(jax.random.split(jax.random.key(8), REPLICAS)))
    return last.T @ last / REPLICAS


def plateau(preconditioner, alpha):
    """V = A V Aᵀ + α² P⁻¹ Σ P⁻¹ with A = I - α P⁻¹ H: the discrete Lyapunov equation."""
    inverse = np.linalg.inv(preconditioner)
    a = np.eye(SIZE) - alpha * inverse @ HESSIAN
    noise = alpha**2 * inverse @ (HESSIAN / BATCH) @ inverse.T
    size = SIZE * SIZE
    return np.linalg.solve(np.eye(size) - np.kron(a, a), noise.ravel()).reshape(SIZE, SIZE)


def assert_covariance(found, expected):
    """Entry by entry within 4.5 standard errors of a covariance of normal vectors."""
    d = np.diag(expected)
    error = np.sqrt((expected**2 + np.outer(d, d)) / REPLICAS)
    assert np.abs((found - expected) / error).max() < 4.5


PRECONDITIONED = {
    "H": (lambda rate: cx.newton_cg(rate, solver=cx.dense()), HESSIAN),
    "F": (lambda rate: cx.natural_gradient(rate, damping=0.0, solver=cx.dense()), HESSIAN),
    "F damped": (
        lambda rate: cx.natural_gradient(rate, damping=0.5, solver=cx.dense()),
        HESSIAN + 0.5 * np.eye(SIZE),
    ),
    "I": (lambda rate: cx.pipe(optax.sgd(rate)), np.eye(SIZE)),
}


@pytest.mark.parametrize("name", PRECONDITIONED)
def test_fixed_steps_end_at_the_covariance_of_the_lyapunov_equation(name):
    make, preconditioner = PRECONDITIONED[name]
    alpha = 0.3
    slowest = np.linalg.eigvals(np.linalg.inv(preconditioner) @ HESSIAN).real.min()
    steps = int(12 / (alpha * slowest))
    assert_covariance(spread(make(alpha), steps), plateau(preconditioner, alpha))


def test_newton_steps_of_one_over_k_have_the_covariance_of_the_mean_of_all_batches():
    """θ_k = mean of H⁻¹ noise over k batches: covariance H⁻¹ Σ H⁻¹ / k, the best there is."""
    steps = 40
    tx = cx.newton_cg(lambda k: 1.0 / (k + 1), solver=cx.dense())
    assert_covariance(spread(tx, steps), np.linalg.inv(HESSIAN) / BATCH / steps)


@pytest.mark.parametrize("name", ["F", "I"])
def test_polyak_averaging_of_fixed_steps_reaches_the_same_covariance(name):
    """The average forgets the preconditioner: H⁻¹ Σ H⁻¹ / k, up to O(1/k²)."""
    make, _ = PRECONDITIONED[name]
    steps = 600
    found = spread(make(0.3), steps, averaged=True)
    expected = np.linalg.inv(HESSIAN) / BATCH / steps
    np.testing.assert_allclose(np.diag(found), np.diag(expected), rtol=0.12)
