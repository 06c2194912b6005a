"""The text of a method: the pipe that it builds, and the places of its errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.pipes.parts import name_of, options_of, parts_of, walk
from curvax.training.config.recipe import outline, parse, vocabulary, with_argument
from curvax.training.runtime.errors import ConfigError

PARAMS = {"w": jnp.array([1.0, -2.0, 3.0])}
SCALES = jnp.array([1.0, 4.0, 9.0])


def loss(params):
    return 0.5 * jnp.sum(SCALES * params["w"] ** 2) + jnp.sum(jnp.sin(params["w"]))


def trajectory(optimizer, steps=5):
    """The parameters after each of a few steps."""
    params, state, visited = PARAMS, optimizer.init(PARAMS), []
    for _ in range(steps):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value_fn=loss, value=value)
        params = optax.apply_updates(params, updates)
        visited.append(params["w"])
    return np.stack(visited)


def place_of_caret(text, **options):
    """The message, and the text from the caret on."""
    with pytest.raises(ConfigError) as caught:
        parse(text, **options)
    *_, message, line, caret = str(caught.value).split("\n")
    assert caret.strip() == "^"
    return message, line[caret.index("^") :]


@pytest.mark.parametrize(
    ("text", "built"),
    [
        (
            "sam_perturb(0.2) | gsam_project(0.4) | adamw(cosine(1e-3, warmup=2), b1=0.8)",
            lambda: (
                curvax.sam_perturb(0.2)
                | curvax.gsam_project(0.4)
                | optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 2, 10), b1=0.8)
            ),
        ),
        (
            "clip(1.0) | sgd(linear(0.1, end=0.01), momentum=0.9)",
            lambda: optax.chain(
                optax.clip(1.0), optax.sgd(optax.linear_schedule(0.1, 0.01, 10), 0.9)
            ),
        ),
        (
            "every(2, hutchinson_diag(7, probes=2) | ema_rms(.9)) | scale_by_power(1) | scale(-.1)",
            lambda: (
                curvax.every(2, curvax.hutchinson_diag(7, probes=2) | curvax.ema_rms(0.9))
                | curvax.scale_by_power(1.0)
                | optax.scale(-0.1)
            ),
        ),
        (
            "hutchinson_diag(sampler=gaussian_probe) | scale_by_power(0.5) | scale(-0.1)",
            lambda: (
                curvax.hutchinson_diag(sampler=curvax.gaussian_probe)
                | curvax.scale_by_power(0.5)
                | optax.scale(-0.1)
            ),
        ),
        (
            "sam(sgd(step_decay(0.1, [0.2, 0.6], warmup=1)), rho)",
            lambda: curvax.sam(
                optax.sgd(
                    optax.join_schedules(
                        [
                            optax.linear_schedule(0.0, 0.1, 1),
                            optax.piecewise_constant_schedule(0.1, {1: 0.1, 5: 0.1}),
                        ],
                        [1],
                    )
                ),
                0.05,
            ),
        ),
        (
            "sam_perturb(rho_schedule(linear(0.1), 0.2, 0.1, lr_max=0.1)) | sgd(constant(-1e-2))",
            lambda: (
                curvax.sam_perturb(
                    curvax.rho_schedule(optax.linear_schedule(0.1, 0.0, 10), 0.2, 0.1, lr_max=0.1)
                )
                | optax.sgd(-1e-2)
            ),
        ),
        (
            "sgd(polynomial_schedule(0.1, 0.0, 2.0, 10))",
            lambda: optax.sgd(optax.polynomial_schedule(0.1, 0.0, 2.0, 10)),
        ),
        (
            "levenberg_marquardt(\n  hessian_matvec() | damp() | solve(cg(3, tol=0.0))\n"
            "  | scale_by_learning_rate(0.5), damping=2.0)",
            lambda: curvax.levenberg_marquardt(
                curvax.hessian_matvec()
                | curvax.damp()
                | curvax.solve(curvax.cg(3, tol=0.0))
                | optax.scale_by_learning_rate(0.5),
                damping=2.0,
            ),
        ),
        (
            "clip(9.0) | newton_cg(cosine(1.0), damping=0.1, solver=steihaug(radius))",
            lambda: optax.chain(
                optax.clip(9.0),
                curvax.newton_cg(
                    optax.cosine_decay_schedule(1.0, 10), damping=0.1, solver=curvax.steihaug(0.05)
                ),
            ),
        ),
        ("prodigy(1.0)", lambda: optax.contrib.prodigy(1.0)),
        ("muon(1e-2)", lambda: optax.contrib.muon(1e-2)),
        (
            "schedule_free(sgd(0.1), learning_rate=0.1)",
            lambda: optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1),
        ),
        ("\n  clip(0.5)\n  | sgd(0.1)\n", lambda: optax.chain(optax.clip(0.5), optax.sgd(0.1))),
    ],
)
def test_a_text_steps_as_the_pipe_it_spells(text, built):
    read = parse(text, steps=10, names={"rho": 0.05, "radius": 0.05})
    np.testing.assert_array_equal(trajectory(read), trajectory(built()))


def test_names_of_the_caller_precede_curvax_and_curvax_precedes_optax():
    assert optax.partition is not curvax.partition
    assert vocabulary()["partition"] is curvax.partition
    assert vocabulary()["rho_like"] is curvax.rho_schedule  # the name of earlier versions
    assert vocabulary()["sam"] is curvax.sam
    assert {"dpsgd", "sophia"}.isdisjoint(vocabulary())  # which need what no training step has
    read = parse("sgd(0.1)", names={"sgd": optax.adam})
    np.testing.assert_array_equal(trajectory(read), trajectory(optax.adam(0.1)))


@pytest.mark.parametrize(
    ("text", "rest", "hint"),
    [
        ("sam_pertrub(0.2) | adamw(1e-3)", "sam_pertrub", "`sam_perturb`"),
        ("sam_perturb(0.2) | adamww(1e-3)", "adamww", "`adamw`"),
        ("sgd(cosin(0.1))", "cosin(", "`cosine`"),
        ("levenberg_marquardt(damp() | slove(cg(3)) | sgd(1.0))", "slove(", "`solve`"),
        ("levenberg_marquardt(damp() | cg(3) | sgd(1.0))", "cg(3)", "transformation"),
        ("hessian_matvec() | damp() | solve(cg(0))", "cg(0)", "max_steps"),
        ("sgd(0.1, momentun=0.9)", "momentun=", "`momentum`"),
        ("'λ' | sgd(0.1)", "'λ'", "transformation"),
        ("clip(1.0) | 'λ' | sgdd(0.1)", "'λ'", "transformation"),
        ("sgd(0.1) | cosine(0.1)", "cosine", "transformation"),
        ("clip(1.0) | sgd", "sgd", "`sgd(...)`"),
        ("sgd(0.1, momentum=0.9, momentum=0.8)", "momentum=0.8", "twice"),
        ("sgd(**{})", "{}", "by name"),
        ("sgd(0.1 + 0.2)", "0.1 + 0.2", "none of these"),
        ("sgd(*[0.1])", "*[0.1]", "none of these"),
        ("optax.sgd(0.1)", "optax.sgd", "`optax.sgd`"),
        ("sgd(0.1) if True else clip(1.0)", "sgd(0.1) if", "none of these"),
        ("sgd((lambda: 0.1)())", "(lambda", "none of these"),
        ("sgd(__import__('os').getpid())", "__import__", "none of these"),
        ("sgd(open('x'))", "open", "Unknown name"),
        ("sgd([r for r in [0.1]])", "[r for", "none of these"),
        ("sgd(b'x')", "b'x'", "none of these"),
        ("sgd(0.1", "(0.1", "never closed"),
        ("sgd(0.1) |", "", "invalid syntax"),
        ("clip(1.0)\n  | sgdd(0.1)\n", "sgdd(0.1)", "`sgd`"),
        ("", "", "empty"),
    ],
)
def test_parse_errors_point_at_their_place(text, rest, hint):
    message, pointed = place_of_caret(text, steps=10)
    assert pointed.startswith(rest)
    assert hint in message


@pytest.mark.parametrize(
    ("text", "rest", "hint"),
    [
        ("sgd(0.1) | sam_perturb(-0.1)", "sam_perturb(-0.1)", "rho"),
        ("ema_rms(1.5) | sgd(0.1)", "ema_rms(1.5)", "decay"),
        ("clip(1.0) | adamw()", "adamw()", "learning_rate"),
        ("sgd(cosine(0.1, warmup=10))", "cosine", "warmup"),
        ("sgd(step_decay(0.1, [0.5, 2]))", "step_decay", "[0.5, 2]"),
    ],
)
def test_factory_errors_point_at_their_place(text, rest, hint):
    message, pointed = place_of_caret(text, steps=10)
    assert pointed.startswith(rest)
    assert hint in message


def test_schedules_of_the_run_need_its_length():
    message, pointed = place_of_caret("sgd(cosine(0.1))")
    assert pointed.startswith("cosine")
    assert "steps" in message
    assert parse("sgd(cosine(0.1, steps=5))").init(PARAMS)


def test_cosine_and_linear_reach_peak_and_end():
    names = vocabulary(steps=100)
    for schedule in (names["cosine"](2.0, 20, 0.5), names["linear"](2.0, 20, 0.5)):
        np.testing.assert_allclose(
            [schedule(s) for s in (0, 10, 20, 100)], [0, 1, 2, 0.5], rtol=1e-6
        )
        assert schedule(60) == pytest.approx(1.25)


def test_an_outline_names_the_parts():
    text = "sam_perturb(0.2) | gsam_project(0.4)\n | adamw(cosine(1e-3))"
    assert outline(text) == "sam_perturb | gsam_project | adamw"


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("sgd(0.1)", set()),
        ("per_group(4, sgd(0.1))", {4}),
        ("per_group(32, sam_perturb(rho)) | sgd(0.1)", {32}),
        ("per_group(stages=sam_perturb(rho), m=m) | sgd(0.1)", {8}),
        ("apply_if_finite(per_group(2, sam_perturb(rho)) | sgd(0.1), 3)", {2}),
        ('partition({"a": per_group(2, clip(1.0)), "b": per_group(m, clip(1.0))}, {})', {2, 8}),
    ],
)
def test_stages_of_a_text_record_their_options_at_any_depth(text, sizes):
    optimizer = parse(text, names={"m": 8, "rho": 0.05})
    groups = [part for part in walk(optimizer) if name_of(part) == "per_group"]
    assert {options_of(part)["m"] for part in groups} == sizes


def test_plain_part_of_a_text_is_what_its_factory_returns():
    optimizer = parse("sam_perturb(0.1) | adamw(1e-3, weight_decay=0.1)")
    *_, adamw = parts_of(optimizer)
    assert name_of(adamw) == "adamw"
    assert dict(options_of(adamw)) == {"learning_rate": 1e-3, "weight_decay": 0.1}
    written, params = optax.adamw(1e-3, weight_decay=0.1), {"w": jnp.ones(3)}
    expected, _ = written.update(params, written.init(params), params)
    found, _ = adamw.update(params, adamw.init(params), params)
    chex.assert_trees_all_equal(found, expected)


def test_with_argument_adds_it_where_a_factory_lacks_it():
    text = "per_group(2, sam_perturb(rho)) | pmean_updates(axes) | adamw(0.001)"
    changed = with_argument(text, "per_group", sequential=True)
    assert changed == text.replace("(rho))", "(rho), sequential=True)")
    assert with_argument(changed, "per_group", sequential=True) == changed
    plain = "sam_perturb(rho) | adamw(1e-3)"
    assert with_argument(plain, "per_group", sequential=True) == plain
    on_lines = "\n  " + text.replace(" | ", "\n  | ") + "\n"
    assert with_argument(on_lines, "per_group", sequential=True) == changed
