"""Whole models: converting them to network deconvolution, calibrating them, and back to plain layers."""

from netdeconv.nn.published import load_published
from netdeconv.surgery.calibrate import calibrate
from netdeconv.surgery.convert import convert, plan_conversion
from netdeconv.surgery.deploy import check_fused, export_onnx, fuse
from netdeconv.surgery.norms import ChannelAffine
from netdeconv.surgery.plan import Action, ConversionPlan, Entry

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
