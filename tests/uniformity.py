"""A chi-square test against the uniform distribution, for the tests of draws and permutations."""

import torch


def assert_uniform(values, cells):
    """Values are integers in 0..cells-1; a fair draw fails once in 100,000 seeds."""
    values = values.flatten()
    counts = torch.bincount(values, minlength=cells).double()
    assert len(counts) == cells, f"a value of {len(counts) - 1} or more"
    expected = len(values) / cells
    assert expected >= 5, "too few values for a chi-square test"
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * (cells - 1))  # Wilson and Hilferty (1931): the cube root is nearly normal
    limit = (cells - 1) * (1 - spread + 4.265 * spread**0.5) ** 3
    assert statistic < limit, f"chi2 {statistic:.1f} with {cells - 1} degrees, limit {limit:.1f}"
