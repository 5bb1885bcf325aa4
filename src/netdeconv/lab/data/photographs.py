"""The photographs that scikit-learn ships."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["photographs"]


def photographs() -> Tensor:
    """scikit-learn's two photographs (a temple, a flower), values 0 to 1.

    Returns:
        ``(2, 3, 427, 640)`` in float32.
    """
    from sklearn.datasets import load_sample_images

    images = np.stack(load_sample_images().images)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
