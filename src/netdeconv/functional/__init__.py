"""The numeric core: tensors in, tensors out, no modules and no state."""

from netdeconv.functional.blocks import Blocks
from netdeconv.functional.fold import fold
from netdeconv.functional.gram import inverse_sqrt_of_rows
from netdeconv.functional.isqrt import SOLVERS, inverse_sqrt
from netdeconv.functional.linear_step import whitened_linear
from netdeconv.functional.moments import Moments, patch_moments
from netdeconv.functional.patches import Window, gather_patches, mean_patch
from netdeconv.functional.sampling import Sample, corner_patches, spread_patches
from netdeconv.functional.scale import channel_variance, scale_of, varies, what_varies
from netdeconv.functional.step import Geometry, Slope, scale_and_slope, whitened_convolution
from netdeconv.functional.unfold import unfold

__all__ = [
    "SOLVERS",
    "Blocks",
    "Geometry",
    "Moments",
    "Sample",
    "Slope",
    "Window",
    "channel_variance",
    "corner_patches",
    "fold",
    "gather_patches",
    "inverse_sqrt",
    "inverse_sqrt_of_rows",
    "mean_patch",
    "patch_moments",
    "scale_and_slope",
    "scale_of",
    "spread_patches",
    "unfold",
    "varies",
    "what_varies",
    "whitened_convolution",
    "whitened_linear",
]
