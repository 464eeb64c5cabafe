"""Scans on disk: reading them, finding them, and writing maps on their own voxels."""

from volsal.scans.case import read_case
from volsal.scans.scan import MissingScanError, Scan, ScanError, read_scan

__all__ = ["MissingScanError", "Scan", "ScanError", "read_case", "read_scan"]
