"""Results on paper: figures of scans, maps and cohorts."""

from volsal.report.figures import Row, montage, save, three_planes

__all__ = ["Row", "montage", "save", "three_planes"]
