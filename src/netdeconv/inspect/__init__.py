"""What whitening does: correlation and sparsity of patches, layer by layer, and the filters that whiten them."""

from __future__ import annotations

from netdeconv.inspect.filters import centre_filters, root_filters, whitening_filters
from netdeconv.inspect.layers import LayerView, Responses, inspect_layers
from netdeconv.inspect.sparsity import hoyer_sparsity, kurtosis, unit_histogram
from netdeconv.inspect.whiteness import (
    correlation,
    mean_abs_offdiagonal,
    pair_correlations,
    patch_correlation,
    patch_covariance,
)

__all__ = [
    "LayerView",
    "Responses",
    "centre_filters",
    "correlation",
    "hoyer_sparsity",
    "inspect_layers",
    "kurtosis",
    "mean_abs_offdiagonal",
    "pair_correlations",
    "patch_correlation",
    "patch_covariance",
    "root_filters",
    "unit_histogram",
    "whitening_filters",
]
