"""The test score by which methods are compared, and how it is written in tables and sentences."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class SelectionMetric(NamedTuple):
    """A score, its direction, and its wording."""

    name: str  # among the scores: "accuracy"
    form: str  # of a value: "{:.1%}"
    claim: str  # verb phrase with the value: "classifies {} of the test images correctly"
    unit: str = ""  # of a difference
    scale: float = 1  # units per difference of one
    digits: int = 3  # decimals of a difference
    higher_is_better: bool = False

    @property
    def result_key(self) -> str:
        """Its name in results.json: `test_accuracy`."""
        return f"test_{self.name}"

    @property
    def log_key(self) -> str:
        """Its name in metrics.jsonl: `test/accuracy`."""
        return f"test/{self.name}"

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    @property
    def over(self) -> str:
        """The words between a difference and the baseline: `points over`."""
        return f"{self.unit} {'over' if self.higher_is_better else 'against'}".strip()

    def key(self, score: float) -> float:
        """The sort key of a score: the larger, the better; -∞ for a run that diverged."""
        if math.isnan(score):
            return -math.inf
        return score if self.higher_is_better else -score

    def best(self, scores: Iterable[float]) -> float:
        """The best of some scores; NaN if there are none."""
        return max(scores, key=self.key, default=math.nan)


CLASSIFICATION = SelectionMetric(
    "accuracy", "{:.1%}", "classifies {} of the test images correctly", "points", 100, 1, True
)
RECONSTRUCTION = SelectionMetric(
    "loss", "{:.2f}", "reconstructs the test images at a loss of {}", "nats"
)
REGRESSION = SelectionMetric(
    "squared_error", "{:.3f}", "predicts the test targets with a squared error of {}"
)
CLICKS = SelectionMetric(
    "auc",
    "{:.4f}",
    "ranks the test rows with an AUC of {}",
    "points",
    100,
    2,
    higher_is_better=True,
)
LANGUAGE = SelectionMetric("loss", "{:.3f}", "predicts the test text at {} nats a byte", "nats")
