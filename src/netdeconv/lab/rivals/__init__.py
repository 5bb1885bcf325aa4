"""Methods that a user might take instead of network deconvolution, from their papers."""

from netdeconv.lab.rivals.dbp import DecorrelatedConv2d, DecorrelatedLinear
from netdeconv.lab.rivals.iternorm import IterNorm
from netdeconv.lab.rivals.standardised import StandardisedConv2d
from netdeconv.lab.rivals.swbn import SWBN

__all__ = ["SWBN", "DecorrelatedConv2d", "DecorrelatedLinear", "IterNorm", "StandardisedConv2d"]
