"""Findings of `curvax inspect`: the sentences that planted numbers must give."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from curvax.inspection.encoding import encode
from curvax.inspection.findings import RunFacts, caveats, findings
from curvax.inspection.measures import RHO
from curvax.inspection.page import Content, page
from curvax.inspection.peak_lr import peak_rate
from curvax.inspection.phrasing import listing, ratio
from curvax.inspection.runner import Omission, Results
from curvax.inspection.summary_table import summary_rows
from curvax.linalg import Eigenpairs
from curvax.training.config.recipe import parse


def pairs(*values, converged=True):
    flags, zeros = jnp.full(len(values), converged), jnp.zeros(len(values))
    return Eigenpairs(jnp.array(values), None, zeros, flags, jnp.array(40))


def gap(sigma, corrected, loss):
    return SimpleNamespace(
        sigma_max=sigma, sigma_max_corrected=corrected, loss=loss, gradient_norm=1.0
    )


def blocks(**values):
    return {
        name.replace("__", "/"): SimpleNamespace(value=value, converged=True)
        for name, value in values.items()
    }


@pytest.fixture
def found():
    """Two runs of which the second is flatter, most so in one block."""
    return Results(
        {
            "eigenpairs": {"sgd": pairs(104.0, 50, 40, 30, 20), "sam": pairs(4.0, 3, 2.5, 2.2, 2)},
            "surrogate_gap": {
                "sgd": {RHO: gap(500.0, 90.0, 0.2)},
                "sam": {RHO: gap(9.0, 4.4, 0.5)},
            },
            "blocks": {
                "sgd": blocks(embedding=10.0, block=90.0, block__mlp=80.0, head=30.0),
                "sam": blocks(embedding=8.0, block=3.0, block__mlp=2.0, head=3.0),
            },
            "inside": {
                "sgd": SimpleNamespace(active={"mlp/gelu": 0.5, "mlp/gelu_1": 0.4}),
                "sam": SimpleNamespace(active={"mlp/gelu": 0.2, "mlp/gelu_1": 0.39}),
            },
            "random_sharpness": {
                "sgd": SimpleNamespace(value=np.float32(0.2), standard_error=np.float32(0.01)),
                "sam": SimpleNamespace(value=np.float32(-0.01), standard_error=np.float32(0.004)),
            },
        }
    )


def facts(**changes):
    return RunFacts("mlp", 0.1, 10, 10, False)._replace(**changes)


def test_findings_give_numbers_ratios_and_blocks(found):
    assert findings(found) == [
        "The largest eigenvalue of the Hessian is 104 in `sgd` and 4 in `sam` (26 times smaller).",
        "The block of largest eigenvalue is `block/mlp` in `sgd` (80), `embedding` in `sam` (8).",
        "From `sgd` to `sam` λ_max changes most in `block/mlp`, 80 → 2 (40 times smaller), and "
        "least in `embedding` (20% smaller).",
        "The top stands out of the bulk by λ₁/λ₅ = 5.20 in `sgd` and 2.00 in `sam` (2.6 times "
        "smaller).",
        "The surrogate gap at ρ = 0.05 estimates λ_max, by 2h/ρ² and less the part of the "
        "gradient, at 500 and 90 in `sgd`, where it is 104; 9 and 4.4 in `sam`, where it is 4.",
        "From `sgd` to `sam` the share of active units changes most at `mlp/gelu`, 50% → 20% (2.5 "
        "times smaller), and least at `mlp/gelu_1` (about the same).",
        "Under random perturbations the test loss changes by +0.2 in `sgd` and -0.01 in `sam`; it "
        "falls in `sam`, where the condition of SAM's Theorem 2 does not hold.",
    ]


def test_findings_of_one_run_compare_nothing(found):
    for runs in found.results.values():
        del runs["sam"]
    said = findings(found)
    assert said[0] == "The largest eigenvalue of the Hessian is 104 in `sgd`."
    assert not any("From" in sentence or "(" in sentence for sentence in said[2:])
    assert caveats(found, {"sgd": facts()}) == []


def test_caveats_name_differences_between_runs(found):
    found.results["eigenpairs"]["sgd"] = pairs(104.0, converged=False)
    about = {
        "sgd": facts(step=5, normalised=True),
        "sam": facts(rate=0.01, model="resnet8", normalised=True),
    }
    said = caveats(found, about)
    for words in (
        "`sgd` is measured at step 5 of 10",
        "The models differ.",
        "The learning rates differ (0.1 in `sgd` and 0.01 in `sam`)",
        "The training losses differ (0.2 in `sgd` and 0.5 in `sam`)",
        "λ_max of `sgd` did not converge",
        "batch norm",
    ):
        assert any(words in sentence for sentence in said), words
    assert len(said) == 6


def test_caveats_name_equal_settings(found):
    found.results["surrogate_gap"]["sam"][RHO].loss = 0.201
    said = caveats(found, {"sgd": facts(), "sam": facts()})
    assert said == [
        "The learning rates are equal at their peak, 0.1.",
        "The training losses are equal to 10% (0.2 in `sgd` and 0.201 in `sam`).",
    ]
    said = caveats(found, {"sgd": facts(rate=None), "sam": facts()})
    assert "learning rate of `sgd` could not be read" in said[0]


def test_findings_without_results_are_empty():
    assert findings(Results()) == []
    assert summary_rows(Results()) == {}


@pytest.mark.parametrize(
    ("value", "base", "words"),
    [
        (4.0, 104.0, "26 times smaller"),
        (1.02, 1.0, "about the same"),
        (1.31, 1.0, "31% larger"),
        (0.69, 1.0, "31% smaller"),
        (2.34, 1.0, "2.3 times larger"),
        (-1234.0, -1.0, "1,200 times larger"),
        (1.0, -1.0, ""),
        (1.0, 0.0, ""),
    ],
)
def test_ratio_is_given_in_words(value, base, words):
    assert ratio(value, base) == words


def test_thousands_are_written_without_exponent():
    assert listing({"a": 1723.4, "b": 0.00123}, "{:.3g}", compared=False) == (
        "1,720 in `a` and 0.00123 in `b`"
    )


def test_change_within_its_standard_error_is_called_none(found):
    found.results["random_sharpness"]["sam"].standard_error = np.float32(0.006)
    told = next(each for each in findings(found) if "random perturbations" in each)
    assert told.endswith("in `sam` that is within two standard errors of nothing.")
    found.results["random_sharpness"]["sam"].value = np.float32(0.1)
    told = next(each for each in findings(found) if "random perturbations" in each)
    assert told.endswith("the condition of SAM's Theorem 2 holds there.")


def test_listing_compares_three_runs():
    assert listing({"a": 1.0, "b": 3.0, "c": 1.0}, "{:g}") == (
        "1 in `a`, 3 in `b` (3.0 times larger) and 1 in `c` (about the same)"
    )


def test_a_page_escapes_its_texts_and_makes_code_of_names_in_backticks(found):
    content = Content(
        title="<title>",
        lead="The run `a<b`.",
        findings=['f < `g` & "h"'],
        caveats=[],
        about={"sgd": {"method": "`sgd`"}, "sam": {}},
        rows=list(summary_rows(found).values()),
        figures=[],
        omissions=[Omission("trace", ("sgd", "sam"), "budget", "It takes <1 s.")],
        closing="",
    )
    text = page(content)
    for part in (
        "<h1>&lt;title&gt;</h1>",
        "The run <code>a&lt;b</code>.",
        "<li>f &lt; <code>g</code> &amp; &#34;h&#34;</li>",
        "<td><code>sgd</code></td><td></td>",
        '<td class="number">104</td><td class="number">4<small>26 times smaller</small></td>',
        "lack of time: trace (<code>sgd</code>, <code>sam</code>). It takes &lt;1 s.",
    ):
        assert part in text
    assert "Read with care" not in text


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("sam_perturb(rho) | adamw(cosine(lr, warmup=5))", 1e-3),
        ("sgd(learning_rate=0.1, momentum=0.9)", 0.1),
        ("hutchinson_diag() | scale_by_power(1.0) | scale_by_learning_rate(0.15)", 0.15),
        ("adam(step_decay(3e-2, [0.5]))", 3e-2),
        ("sgd(warmup_cosine_decay_schedule(0.0, 1.0, 5, 10))", 1.0),
        ("adamw(cosine(lr)) | add_decayed_weights(1e-4)", 1e-3),
        ("sgd(0.1) | clip_by_global_norm(1.0) | ema_rms(0.9)", 0.1),
        ("clip_by_global_norm(1.0)", None),
        ("gsam(sgd(cosine(0.1)), 0.05, 0.2)", 0.1),
        ("levenberg_marquardt(gauss_newton_matvec() | damp())", None),
    ],
)
def test_peak_learning_rate_is_that_of_the_last_part_that_has_one(text, rate):
    optimizer = parse(text, steps=20, names={"lr": 1e-3, "rho": 0.1})
    assert peak_rate(optimizer, 20) == pytest.approx(rate)


def test_encode_gives_null_for_numbers_that_are_not_finite():
    found = {0.5: pairs(1.0, np.inf), "list": [np.float32(2), (np.nan, True)]}
    assert encode(found) == {
        "0.5": {
            "values": [1.0, None],
            "residuals": [0.0, 0.0],
            "converged": [True, True],
            "products": 40,
        },
        "list": [2.0, [None, True]],
    }
