"""Tables of numbers to be predicted: rows of features and of targets, standardised."""

import numpy as np
from sklearn.datasets import load_diabetes

from curvax.training.data import datasets
from curvax.training.data.archives import DataError
from curvax.training.data.datasets import Dataset, Split

TEST = 88  # of 442 rows, a fifth


def load(name: str, *, path: str | None = None, seed: int = 0) -> Dataset[Split]:
    """The table of that name; features [N, D] and targets [N, 1] in units of their deviation.

    `diabetes` (354 + 88 patients, 10 features; the target is the progression of the disease after a
    year) comes with scikit-learn. Efron et al., Least Angle Regression, 2004.

    Args:
        path: has no use here.
        seed: divides the table.

    Raises:
        DataError: an unknown name, or a path.
    """
    if name != "diabetes" or path is not None:
        raise DataError(
            f"The one table is `diabetes`, which comes with scikit-learn, and got the name "
            f"`{name}` and the path {path}."
        )
    features, target = load_diabetes(return_X_y=True, scaled=False)
    whole = Split(features, target[:, None])
    train, test = datasets.divide(whole, TEST, seed=seed, purpose="load")
    return Dataset(_standardised(train, train), _standardised(test, train), classes=1)


def _standardised(split: Split, by: Split) -> Split:
    """Less the mean of another split, over its deviation, column by column."""
    scaled = (
        (values - of.mean(0, keepdims=True)) / of.std(0, keepdims=True)
        for values, of in zip(split, by)
    )
    return Split(*(values.astype(np.float32) for values in scaled))
