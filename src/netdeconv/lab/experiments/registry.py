"""The experiments by name; a module is imported when its experiment is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netdeconv.lab.experiments.experiment import Experiment

__all__ = ["EXPERIMENTS", "load"]

# Name on the command line -> module in this package, whose EXPERIMENT it is, and a line for --help.
EXPERIMENTS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "a small network on digits, in a minute: what netdeconv demo trains"),
    "regression": ("regression", "linear models: whitened input makes gradient descent converge in one iteration"),
    "mlp": ("mlp", "a multi-layer perceptron: no normalisation, batch normalisation, network deconvolution"),
    "cifar": ("cifar", "table 1: networks on CIFAR, batch normalisation at its best rate, and network deconvolution"),
    "rivals": ("rivals", "what else could be taken: IterNorm, DBP, SWBN, GroupNorm, AdamW, Muon, by steps and seconds"),
    "vit": ("vit", "a small vision transformer: its linear layers plain, whitened, and decorrelated by DBP"),
    "batch-size": ("batch_size", "batch normalisation and network deconvolution in small and large batches"),
    "ablation": ("ablation", "block size, sampling, iterations, eps, refresh period, gradient: one changed at a time"),
    "cost": ("cost", "operations and time of whitening, layer by layer, published procedure and default"),
    "filters": ("filters", "whitening filters of natural images have a centre and a surround"),
    "sparsity": ("sparsity", "whitened responses are sparse: photographs, and the layers of a trained network"),
    "correlation": ("correlation", "whitening removes the correlation of pixels and of channels, layer by layer"),
    "imagenet": ("imagenet", "classification: the pipeline for ImageNet (table 2), at small sizes on CIFAR-10's files"),
    "cityscapes": ("cityscapes", "segmentation of streets: the pipeline for Cityscapes (table 3), on CamVid"),
}


def load(name: str) -> Experiment:
    """The experiment of this name, one of :data:`EXPERIMENTS`."""
    module, _ = EXPERIMENTS[name]
    found: Experiment = importlib.import_module(f"netdeconv.lab.experiments.{module}").EXPERIMENT
    return found
