"""SAM beside AdamW with less data, in transfer and under corruptions.

    python -m pytest tests/evidence/test_transfer_and_robustness.py -m evidence

writes tests/evidence/data_fractions.md, transfer.md and corruptions.md; one of them with `-k`.
"""

import evidence_tables
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wrong_labels import ended, shown, trained

from curvax.training.config import configs
from curvax.training.data import labelled_images
from curvax.training.data.archives import DataError
from curvax.training.evaluation import test_sets, topk
from curvax.training.experiment import Experiment, build

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_transfer_and_robustness.py -m evidence"
SEEDS = 5
MADE = (
    f"Made by `{COMMAND} -k {{}}` with jax {jax.__version__}, means of {SEEDS} seeds ± half of the "
    "95 % interval. {}"
)


def experiment_of(name: str, text: str, **fields: object) -> Experiment:
    config = configs.load(name)
    config.devices, config.optimizer = 1, text
    for field, value in fields.items():
        configs.assign(config, field.replace("__", "."), str(value))
    return build(config)


def test_gain_by_the_share_of_the_data():
    """ViT paper, Table 4: the fewer examples, the more SAM gains."""
    rows, base = [], "adamw(cosine(1e-3))"
    for noise in (0.0, 0.4):
        for count in (1000, 500, 250, 100):
            fields = dict(data__num_train=count, data__label_noise=noise, batch=50)
            accuracies = []
            for text in (base, f"sam_perturb(0.2) | {base}"):
                experiment = experiment_of("digits", text, **fields)
                found = [trained(experiment.with_seed(seed))[0] for seed in range(SEEDS)]
                accuracies.append(100 * np.array(found))
            gain = shown(list(accuracies[1] - accuracies[0]), 1)
            rows.append((f"{noise:.0%}", count, *(shown(list(a), 1) for a in accuracies), gain))
    evidence_tables.write(
        "data_fractions",
        "SAM's gain by the number of training images",
        MADE.format(
            "share",
            f"The Mixer of `digits`, 60 epochs in batches of 50, `{base}` with and without "
            "`sam_perturb(0.2)`; accuracy on clean test images in %.",
        ),
        ["wrong labels", "images", "AdamW", "SAM", "gain"],
        rows,
    )
    assert len(rows) == 8


def test_transfer_by_plain_sgd():
    """ViT paper, Table 6."""
    few = "sgd(cosine(0.03), momentum=0.9)"
    after = experiment_of("digits_finetune", few)
    rows = []
    for name, before in (
        ("none", None),
        ("AdamW", "adamw(cosine(3e-3))"),
        ("SAM", "sam_perturb(0.1) | adamw(cosine(3e-3))"),
    ):
        first = before and experiment_of("digits_finetune:mnist", before)
        sources, targets = [], []
        for seed in range(SEEDS):
            tuned = after.with_seed(seed)
            state = tuned.init()
            if first:
                source = ended(first.with_seed(seed))
                sources.append(100 * first.test(source)["accuracy"])
                state = state._replace(params=jax.tree.map(jnp.copy, source.params))
            targets.append(100 * tuned.test(ended(tuned, state))["accuracy"])
        rows.append((name, shown(sources, 1) if sources else "–", shown(targets, 1)))
    evidence_tables.write(
        "transfer",
        "Fine-tuning of what AdamW and SAM trained",
        MADE.format(
            "transfer",
            "A Mixer on 4000 images of MNIST for 10 epochs, then 50 images of digits by "
            f"`{few}`, as in `digits_finetune`; accuracy on the test images of each in %.",
        ),
        ["weights from", "MNIST", "digits"],
        rows,
    )
    assert len(rows) == 3


def test_accuracy_under_corruptions():
    try:
        labelled_images.load("fashion_mnist")
    except DataError:
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    rows, base = [], "adamw(cosine(1e-3))"
    for noise in (0.0, 0.4):
        for name, text in (("AdamW", base), ("SAM", f"sam_perturb(0.2) | {base}")):
            experiment = experiment_of("fashion_mixer", text, data__label_noise=noise)
            clean, under = [], []
            for seed in range(SEEDS):
                seeded = experiment.with_seed(seed)
                state, rank = ended(seeded), topk.make_rank(seeded)
                clean.append(100 * seeded.test(state)["accuracy"])
                found = [
                    topk.evaluate(seeded, state, _few(each), rank)
                    for each in test_sets.corrupted(seeded)
                ]
                under.append(100 * topk.means(found)[topk.MEAN].top1)
            rows.append((f"{noise:.0%}", name, shown(clean, 1), shown(under, 1)))
    evidence_tables.write(
        "corruptions",
        "SAM under corrupted test images",
        MADE.format(
            "corruptions",
            f"The Mixer of `fashion_mixer` on 512 images, `{base}` with and without "
            "`sam_perturb(0.2)`. Accuracy in % on the test images, and its mean over corruptions "
            "of five strengths of the first 1000 (`curvax evaluate --corruptions`).",
        ),
        ["wrong labels", "method", "clean", "corrupted"],
        rows,
    )
    assert len(rows) == 4


def _few(eval_set: test_sets.EvalSet) -> test_sets.EvalSet:
    return eval_set._replace(examples=eval_set.examples.rows(slice(1000)))
