"""Layers that whiten their input."""

from netdeconv.nn.channel import ChannelWhitening
from netdeconv.nn.conv import WhitenedConv1d, WhitenedConv2d, WhitenedConv3d
from netdeconv.nn.freezing import freeze, unfreeze
from netdeconv.nn.linear import WhitenedLinear
from netdeconv.nn.whitening import Whitening

__all__ = [
    "ChannelWhitening",
    "WhitenedConv1d",
    "WhitenedConv2d",
    "WhitenedConv3d",
    "WhitenedLinear",
    "Whitening",
    "freeze",
    "unfreeze",
]
