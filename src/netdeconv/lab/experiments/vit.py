"""Whitening in a transformer: the linear layers of a small ViT, whose layer norms stay, beside plain and DBP."""

from __future__ import annotations

import dataclasses

from netdeconv.lab.experiments import rivals

__all__ = ["EXPERIMENT"]

_SMALL = rivals.RivalsSettings(
    networks=("vit",),
    methods=("bn/adamw", "nd/adamw", "dbp/adamw"),
    adaptive_rates=(0.001, 0.003, 0.0003),
    epochs=5,
)

EXPERIMENT = dataclasses.replace(
    rivals.EXPERIMENT,
    name="vit",
    claim="Whitening its linear layers speeds up the training of a vision transformer.",
    source="not in the paper; Decorrelation Speeds Up Vision Transformers, arXiv 2510.14657, has it of DBP",
    sizes={
        "smoke": dataclasses.replace(
            _SMALL, networks=("vit@0.1",), dataset="digits", adaptive_rates=(0.001,), epochs=1, steps=3, seeds=1,
            batch_size=32, rounds=1,
        ),
        "small": _SMALL,
        "paper": dataclasses.replace(_SMALL, epochs=50),
    },
    code=("lab/experiments/vit.py", *rivals.EXPERIMENT.code),
)  # fmt: skip
