"""What the figures of an evaluation share."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any:
    """Returns matplotlib's pyplot, drawing to files.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("drawing takes matplotlib: pip install 'monolith_jax[report]', or give --no-figures") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as found

    return found
