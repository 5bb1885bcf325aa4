"""Network deconvolution (Ye et al., ICLR 2020) for PyTorch: layers that whiten their input, instead of batch norms."""

from netdeconv import functional
from netdeconv.config import WhiteningConfig
from netdeconv.errors import (
    ConfigError,
    NonFiniteWarning,
    NumericalError,
    ShapeError,
    StatisticsError,
    StatisticsWarning,
)
from netdeconv.nn import (
    ChannelWhitening,
    WhitenedConv1d,
    WhitenedConv2d,
    WhitenedConv3d,
    WhitenedLinear,
    freeze,
    unfreeze,
)
from netdeconv.surgery import calibrate, check_fused, convert, fuse, plan_conversion

__version__ = "0.1.0"

__all__ = [
    "ChannelWhitening",
    "ConfigError",
    "NonFiniteWarning",
    "NumericalError",
    "ShapeError",
    "StatisticsError",
    "StatisticsWarning",
    "WhitenedConv1d",
    "WhitenedConv2d",
    "WhitenedConv3d",
    "WhitenedLinear",
    "WhiteningConfig",
    "calibrate",
    "check_fused",
    "convert",
    "freeze",
    "functional",
    "fuse",
    "plan_conversion",
    "unfreeze",
]
