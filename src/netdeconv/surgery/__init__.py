"""Whole models: converting them to network deconvolution, calibrating them, and back to plain layers."""

from netdeconv.surgery.affine import ChannelAffine
from netdeconv.surgery.calibrate import calibrate
from netdeconv.surgery.convert import convert
from netdeconv.surgery.export import export_onnx
from netdeconv.surgery.fuse import check_fused, fuse
from netdeconv.surgery.plan import Action, ConversionPlan, Entry
from netdeconv.surgery.planned import plan_conversion
from netdeconv.surgery.published import load_published

__all__ = [
    "Action",
    "ChannelAffine",
    "ConversionPlan",
    "Entry",
    "calibrate",
    "check_fused",
    "convert",
    "export_onnx",
    "fuse",
    "load_published",
    "plan_conversion",
]
