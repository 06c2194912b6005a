"""SAM, ASAM and GSAM against the runs of the public implementations.

ε̂ is read off through the public API: at θ + ε̂ the loss ½‖· - θ‖² has the gradient ε̂.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import Run, assert_same, follow, recorded, replay, row, stepper, tap, tapped

from curvax import (
    asam,
    asam_all,
    dual_norm,
    gsam,
    pipe,
    rho_schedule,
    sam,
    sam_perturb,
    weight_scaled,
)


def momentum_sgd(hyper, learning_rate):
    """PyTorch's SGD, whose weight decay sees the restored weights."""
    return pipe(
        optax.add_decayed_weights(hyper.get("weight_decay", 0.0)),
        optax.sgd(learning_rate, hyper.get("momentum"), nesterov=hyper.get("nesterov", False)),
    )


def ascent_of(run):
    if run.meta["case"].startswith("asam_"):
        return asam(run.hyper["eta"])
    return asam_all() if run.hyper.get("adaptive") else dual_norm(2)


def one_step_tolerance(run):
    """davda54 and the author of GSAM add 1e-12 to every norm that they divide by, which moves the
    quotient by 1e-12 over the norm; Samsung's 1e-16 does not show."""
    if "Samsung" in run.meta["reference"]:
        return run.tolerances[1]
    clean, perturbed = run.tree("grad"), run.tree("grad_perturbed")
    if run.hyper.get("adaptive"):
        clean = {name: np.abs(run.params[name][:-1]) * g for name, g in clean.items()}
    flat = lambda tree: np.concatenate([x.reshape(len(x), -1) for x in tree.values()], axis=1)
    norms = np.linalg.norm([flat(clean), flat(perturbed)], axis=2)
    return run.tolerances[1] * (1 + 1 / norms.min())


def perturbations(params, grads, rho, ascent):
    """ε̂ for each row of parameters, gradients and ρ."""

    def one(params, grads, rho):
        square = lambda x, y: jnp.sum((x - y) ** 2)
        distance = lambda p: sum(jax.tree.leaves(jax.tree.map(square, p, params))) / 2
        tx = sam_perturb(rho, ascent=ascent)
        return tx.update(grads, tx.init(params), params, value_fn=distance)[0]

    return jax.jit(jax.vmap(one))(params, grads, rho)


@pytest.mark.parametrize("path", recorded("sam_*", "asam_*", "asamlib_sam_*"))
def test_sam_and_asam_follow_the_pytorch_codes(path):
    run = Run(path)
    hyper, ascent = run.hyper, ascent_of(run)
    base = tap("grad_perturbed") | momentum_sgd(hyper, hyper["lr"])
    params, states = follow(run, lambda _: sam(base, hyper["rho"], ascent=ascent))
    step = one_step_tolerance(run)
    assert_same(params, run.params, run.tolerances[0])
    assert_same(tapped(states, "grad_perturbed"), run.tree("grad_perturbed"), step)
    for figure, name in (("loss", "loss"), ("perturbed_loss", "loss_perturbed")):
        # Diagnostics are float32.
        np.testing.assert_allclose(tapped(states, figure), run[name], rtol=1e-6, err_msg=name)
    rho = np.full(len(states), hyper["rho"])
    found = perturbations(row(run.params, slice(-1)), run.tree("grad"), rho, ascent)
    assert_same(found, run.tree("eps"), step)


@pytest.mark.parametrize("path", recorded("gsam_torch_*"))
def test_gsam_follows_its_first_authors_code(path):
    run = Run(path)
    hyper, ascent = run.hyper, ascent_of(run)

    def method(given):
        base = tap("grad_gsam") | momentum_sgd(hyper, given["lr"])
        return gsam(base, given["rho"], hyper["alpha"], ascent=ascent)

    params, states = follow(run, method, {"lr": run["lr"], "rho": run["rho"]})
    step = one_step_tolerance(run)
    assert_same(params, run.params, run.tolerances[0])
    assert_same(tapped(states, "grad_gsam"), run.tree("grad_gsam"), step)
    found = perturbations(row(run.params, slice(-1)), run.tree("grad"), run["rho"], ascent)
    assert_same(found, run.tree("eps"), step)


def scheduled_rho(hyper, lr, lr_max):
    """ρ of each step by `rho_schedule`, from the recorded learning rates."""
    bounds = {"lr_max": lr_max, "lr_min": hyper["lr_min"]}
    schedule = rho_schedule(lambda t: lr[t], hyper["rho_max"], hyper["rho_min"], **bounds)
    return np.stack([schedule(t) for t in range(len(lr))])


@pytest.mark.parametrize("path", recorded("gsam_torch_*"))
def test_rho_schedule_is_the_recorded_rho(path):
    run = Run(path)
    found = scheduled_rho(run.hyper, run["lr"], run.hyper["lr"])
    # The author's scheduler has not seen the learning rate yet at its first step.
    np.testing.assert_allclose(found[1:], run["rho"][1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("minimize_fp", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("path", recorded("gsam_bv_*"))
def test_gsam_follows_big_vision(path, adaptive, minimize_fp):
    onto = "perturbed" if minimize_fp else "clean"
    ascent = weight_scaled() if adaptive else dual_norm(2)

    def method(given):
        base = tap("grad_gsam") | optax.sgd(given["lr"], given["momentum"])
        return gsam(base, given["rho"], given["alpha"], onto=onto, ascent=ascent)

    step = jax.jit(stepper(Run(path).loss, method))
    for i, hyper in enumerate(Run(path).hyper["settings"]):
        if (hyper["adaptive_perturbation"], hyper["minimize_fp"]) != (adaptive, minimize_fp):
            continue
        run = Run(path, f"s{i}/")
        given = {"lr": run["lr"], "rho": scheduled_rho(hyper, run["lr"], hyper["lr_max"])}
        given |= {name: np.full_like(run["lr"], hyper[name]) for name in ("alpha", "momentum")}
        state = method(row(given, 0)).init(row(run.params, 0))
        params, states = replay(step, state, run.params, run.batches(), given)
        trajectory, single = run.tolerances
        assert_same(params, run.params, trajectory)
        assert_same(tapped(states, "grad_gsam"), run.tree("grad_gsam"), single)


def google_loss(run):
    """Cross-entropy and ½ λ ‖θ‖², so that weight decay moves the ascent too."""
    hyper = run.hyper

    def loss(params, batch):
        with jax.numpy_rank_promotion("allow"):
            logits = run.problem.logits(params, batch)
        labels = jax.nn.one_hot(batch["Y"], logits.shape[-1], dtype=logits.dtype)
        labels = optax.smooth_labels(labels, hyper["label_smoothing"])
        sizes = [
            jnp.sum(x**2)
            for x in jax.tree.leaves(params)
            if x.ndim > 1 or not hyper["no_weight_decay_on_bn"]
        ]
        entropy = jnp.mean(optax.softmax_cross_entropy(logits, labels))
        return entropy + 0.5 * hyper["l2_reg"] * sum(sizes)

    return loss


def on_one_device(step):
    return jax.jit(jax.vmap(step, axis_name="batch"))


def on_many_devices(step):
    return jax.pmap(step, axis_name="batch")


@pytest.mark.parametrize("replicated", [on_one_device, on_many_devices])
@pytest.mark.parametrize("path", recorded("googlesam_*"))
def test_sam_follows_google_research_on_every_replica(path, replicated):
    run = Run(path)
    hyper, replicas = run.hyper, run.hyper["replicas"]
    base = pipe(
        tap("grad_mean_preclip"),
        optax.clip_by_global_norm(hyper["gradient_clipping"]),
        tap("grad_mean_clipped"),
        optax.sgd(hyper["lr"], hyper["beta"], nesterov=hyper["nesterov"]),
    )
    sync = "batch" if hyper["sync_perturbations"] else None
    method = sam(base, hyper["rho"], mean_over="batch", sync_over=sync)
    on_each = lambda tree: jax.tree.map(lambda x: np.repeat(x[:, None], replicas, 1), tree)
    split = lambda x: x.reshape(len(x), replicas, -1, *x.shape[2:])
    params, batches = on_each(run.params), jax.tree.map(split, run.batches())
    step = replicated(stepper(google_loss(run), lambda _: method))
    state = jax.vmap(method.init)(row(params, 0))
    found, states = replay(step, state, params, batches, None)
    trajectory, single = run.tolerances
    assert_same(found, params, trajectory)
    for name in ("grad_mean_preclip", "grad_mean_clipped"):
        assert_same(tapped(states, name), on_each(run.tree(name)), single)


@pytest.mark.parametrize("path", recorded("googlesam_*"))
def test_perturbations_are_those_of_google_research(path):
    run = Run(path)
    rho, replicas = run.hyper["rho"], run.hyper["replicas"]
    params = jax.tree.map(lambda x: np.repeat(x[:-1], replicas, axis=0), run.params)
    flat = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
    grads, directions = map(flat, map(run.tree, ("grad_for_perturbation", "perturbation_dir")))
    rhos = np.full(len(run["gradient_norm"]) * replicas, rho)
    found = perturbations(params, grads, rhos, dual_norm(2))
    assert_same(found, jax.tree.map(lambda e: rho * e, directions), run.tolerances[1])


@pytest.mark.parametrize("path", recorded("optax_sam_*"))
def test_sam_follows_optax(path):
    """Every `sync_period`-th row of a transparent run is a step, the rows between are its ascent:
    steps of length ρ that no ball holds back."""
    run = Run(path)
    hyper, ascents = run.hyper, run.hyper["sync_period"] - 1
    steps = slice(None, None, 1 if hyper["opaque_mode"] else ascents + 1)
    reference, batches = row(run.params, steps), row(run.batches(), steps)
    base = tap("grad_perturbed") | momentum_sgd(hyper, hyper["lr"])
    method = sam(base, hyper["rho"], steps=ascents, step_size=hyper["rho"], projected=False)
    step = jax.jit(stepper(run.loss, lambda _: method))
    params, states = replay(step, method.init(row(reference, 0)), reference, batches, None)
    trajectory, single = run.tolerances
    assert_same(params, reference, trajectory)
    if not hyper["opaque_mode"]:
        grads = row(run.tree("grad"), slice(ascents, None, ascents + 1))
        assert_same(tapped(states, "grad_perturbed"), grads, single)
