"""The numeric core: tensors in, tensors out, no modules and no state."""

from netdeconv.functional.blocks import Blocks
from netdeconv.functional.fold import fold
from netdeconv.functional.isqrt import SOLVERS, inverse_sqrt
from netdeconv.functional.moments import Moments, patch_moments
from netdeconv.functional.patches import Window, corner_patches, spread_patches

__all__ = [
    "SOLVERS",
    "Blocks",
    "Moments",
    "Window",
    "corner_patches",
    "fold",
    "inverse_sqrt",
    "patch_moments",
    "spread_patches",
]
