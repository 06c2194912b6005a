"""Stages that take a diagonal from the caller, and that show it."""

from typing import Any

import curvax as cx

show_diagonal = cx.stage(
    lambda params: (), lambda s, state, params, **_: (s._replace(updates=s.diagonal), state)
)
"""Returns the diagonal as the updates."""


def given_diagonal() -> cx.Stage:
    """An estimator that takes the diagonal from the extra arguments."""

    def rule(signal: cx.Signal, state: Any, params: Any, *, diagonal: Any, **_: Any) -> Any:
        return signal._replace(diagonal=diagonal), state

    return cx.stage(lambda params: (), rule)
