"""Tables for regression: standardised features and targets."""

import numpy as np

from curvax.training.data import datasets
from curvax.training.data.archives import DataError, packaged_table
from curvax.training.data.datasets import Dataset, Split

TEST = 88  # of 442 rows, a fifth


def load(name: str, *, seed: int = 0) -> Dataset[Split]:
    """Loads a table: standardised features [N, D] and targets [N, 1].

    `diabetes` (354 + 88 patients, 10 features; the target is the progression of the disease after a
    year) comes with scikit-learn. Efron et al., Least Angle Regression, 2004.

    Args:
        name: `diabetes`.
        seed: splits the table into training and test rows.

    Raises:
        DataError: the name is unknown.
    """
    if name != "diabetes":
        raise DataError(
            f"The only table is `diabetes`, which comes with scikit-learn, and got `{name}`."
        )
    read = lambda part: packaged_table("sklearn", f"datasets/data/diabetes_{part}.csv.gz", None)
    whole = Split(read("data_raw"), read("target")[:, None])
    train, test = datasets.divide(whole, TEST, seed=seed, purpose="load")
    return Dataset(_standardised(train, train), _standardised(test, train), classes=1)


def _standardised(split: Split, by: Split) -> Split:
    """Standardises columns by the mean and deviation of the split `by`."""
    scaled = (
        (values - of.mean(0, keepdims=True)) / of.std(0, keepdims=True)
        for values, of in zip(split, by)
    )
    return Split(*(values.astype(np.float32) for values in scaled))
