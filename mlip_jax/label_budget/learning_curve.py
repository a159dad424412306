"""Learning curves: error against the number of labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def labels_to_reach(
    num_labels: Sequence[int], errors: Sequence[float], target: float
) -> float | None:
    """Return the number of labels at which a learning curve reaches an error.

    Between two rounds, the logarithm of the error is linear in the logarithm of the number of
    labels. The result is None if no round reaches the error, and the first number of labels if the
    first round does.

    >>> labels_to_reach([100, 400], [0.4, 0.2], 0.2828427)
    200.0

    Args:
      num_labels: Number of labels of each round, ascending.
      errors: Error of each round.
      target: Error to reach.
    """
    for k, error in enumerate(errors):
        if error > target:
            continue
        if k == 0:
            return float(num_labels[0])
        slope = np.log(num_labels[k] / num_labels[k - 1]) / np.log(error / errors[k - 1])
        return round(float(num_labels[k - 1] * (target / errors[k - 1]) ** slope), 1)
    return None
