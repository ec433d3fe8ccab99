"""What several benchmarks say of their figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


class GateError(RuntimeError):
    """A result is wrong, or a contestant computes something else; nothing is timed or reported."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range."""
    return {"median": statistics.median(values), "range": [min(values), max(values)], "n": len(values)}
