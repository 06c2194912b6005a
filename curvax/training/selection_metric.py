"""The score by which methods are compared, and how people read it."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Goal(NamedTuple):
    """A score, whether more of it is better, and its words."""

    name: str  # among the scores: "accuracy"
    form: str  # of its value: "{:.1%}"
    claim: str  # what a method does that reached it: "classifies {} of the test images correctly"
    unit: str = ""  # of a difference
    scale: float = 1  # units of a difference in one of the score
    digits: int = 3  # of a difference, after the point
    rises: bool = False  # whether more is better

    @property
    def figure(self) -> str:
        """Its name among the figures at the end of a run."""
        return f"test_{self.name}"

    @property
    def record(self) -> str:
        """Its name among the records on the way."""
        return f"test/{self.name}"

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    @property
    def over(self) -> str:
        """What stands between a difference and the base: `points over`."""
        return f"{self.unit} {'over' if self.rises else 'against'}".strip()

    def worth(self, score: float) -> float:
        """The higher, the better; a run that diverged is worth least."""
        if math.isnan(score):
            return -math.inf
        return score if self.rises else -score

    def best(self, scores: Iterable[float]) -> float:
        """The best of some scores; NaN where there is none."""
        return max(scores, key=self.worth, default=math.nan)


CLASSIFY = Goal(
    "accuracy", "{:.1%}", "classifies {} of the test images correctly", "points", 100, 1, True
)
RECONSTRUCT = Goal("loss", "{:.2f}", "reconstructs the test images at a loss of {}", "nats")
REGRESS = Goal("squared_error", "{:.3f}", "predicts the test targets with a squared error of {}")
FORETELL = Goal("loss", "{:.3f}", "foretells the test text at {} nats a byte", "nats")
