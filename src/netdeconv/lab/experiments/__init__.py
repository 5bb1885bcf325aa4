"""Experiments: one file each, resumable, results as JSON, pictures and a page."""

from __future__ import annotations
