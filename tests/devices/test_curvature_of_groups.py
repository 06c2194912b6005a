"""Diagonals, probes and products of groups over several devices equal those under plain jit."""

from functools import partial
from typing import Any

import jax
import optax
import pytest
from device_groups import (
    MASK,
    M,
    assert_like_jit,
    grouped,
    on_groups_of_two,
    over_all,
    weighted,
    weighted_batch,
)
from device_problem import DEVICES, PER_DEVICE, make_batch, make_params, one_step, predict

import curvax as cx
from curvax.analysis import m_sharpness

pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)


HESSIANS: dict[str, tuple[cx.Stage, dict[str, Any]]] = {
    "Hutchinson": (cx.hutchinson_diag(probes=2, mean_over=()), {}),
    "Hutchinson, micro-batches": (cx.hutchinson_diag(mean_over=()), {"microbatch": 2}),
    "exact": (cx.exact_diag(mean_over=()), {}),
}


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
@pytest.mark.parametrize("name", HESSIANS)
def test_hessian_of_a_group_of_devices_is_that_of_its_examples(name, mapping):
    estimator, options = HESSIANS[name]
    within = cx.restrict(estimator | cx.scale_by_power(1.0, eps=1.0), MASK)
    assert_like_jit(grouped(within), mapping, make_batch(), **options)


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
def test_estimator_after_groups_of_devices_equals_that_under_jit(mapping):
    groups = cx.per_group(M, cx.sam_perturb(0.3))

    def tx_of(axes):
        shared = cx.hutchinson_diag(mean_over=axes) | cx.pmean_updates(axes)
        return groups | shared | cx.scale_by_power(1.0, eps=1.0) | optax.sgd(0.1)

    assert_like_jit(tx_of, mapping, make_batch())


LOOKS: dict[str, Any] = {
    "groups in groups": cx.per_group(2, cx.sam_perturb(0.3)),
    "m-sharpness": cx.record(sharp=lambda s, p, objective: m_sharpness(objective, p, 0.3, 2).value),
    "empirical Fisher": cx.empirical_fisher_diag(mean_over=()),
    "Fisher": cx.fisher_diag(mean_over=()),
    "Gauss-Newton": cx.gauss_newton_diag(mean_over=()),
    "Fisher product": cx.fisher_matvec(mean_over=()),
    "a part": cx.hutchinson_diag(fraction=0.5, mean_over=()),
    "a probe for each part": cx.hutchinson_diag(shards=8, mean_over=()),
}


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
@pytest.mark.parametrize("name", LOOKS)
def test_stages_that_split_a_group_of_devices_are_refused(name, mapping):
    # A mask hides from `per_group` what the stages within it hand on.
    within = cx.restrict(LOOKS[name], MASK)
    tx = cx.per_group(M, within) | cx.pmean_updates(over_all(mapping))
    params = make_params()
    step = partial(one_step, tx, of=cx.gaussian("y"), model=predict)
    with pytest.raises(ValueError, match="spans several devices here"):
        on_groups_of_two(mapping, step, params, tx.init(params), make_batch())


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
def test_weighted_groups_hand_on_no_shared_diagonal(mapping):
    within = cx.hutchinson_diag(mean_over=over_all(mapping))
    tx = cx.per_group(M, within) | cx.scale_by_power(1.0)
    params = make_params()
    step = partial(one_step, tx, of=weighted, weight="w")
    with pytest.raises(ValueError, match="no earlier stage gave one"):
        on_groups_of_two(mapping, step, params, tx.init(params), weighted_batch())


# A signed D + 1 comes within 1e-3 of zero here: a rounding of 1e-16 in D is 1e-10 in the quotient.
DIVIDED = dict(rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
@pytest.mark.parametrize("m", [2, PER_DEVICE, M])
def test_groups_with_diagonals_of_their_own_equal_those_under_jit_with_weights(m, mapping):
    within = cx.hutchinson_diag(mean_over=()) | cx.scale_by_power(1.0, eps=1.0)
    tx_of = lambda axes: cx.per_group(m, within) | cx.pmean_updates(axes) | optax.sgd(0.1)
    options: Any = dict(tolerance=DIVIDED, of=weighted, weight="w")
    assert_like_jit(tx_of, mapping, weighted_batch(), **options)


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
@pytest.mark.parametrize("parts", [2, 4])
def test_shards_within_a_group_draw_their_own_probes(parts, mapping):
    within = cx.hutchinson_diag(shards=parts, mean_over=()) | cx.scale_by_power(1.0, eps=1.0)
    tx_of = lambda axes: cx.per_group(PER_DEVICE, within) | cx.pmean_updates(axes) | optax.sgd(0.1)
    assert_like_jit(tx_of, mapping, make_batch())


@pytest.mark.parametrize("mapping", ["grid", "pmap"])
@pytest.mark.parametrize("parts", [DEVICES, 2 * DEVICES])
def test_error_of_a_diagonal_counts_the_probes_of_all_devices(parts, mapping):
    def tx_of(axes):
        estimate = cx.hutchinson_diag(shards=parts, probes=2, mean_over=axes)
        return estimate | cx.pmean_updates(axes) | optax.sgd(0.1)

    assert_like_jit(tx_of, mapping, make_batch())
