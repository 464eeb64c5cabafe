"""Many scans: what is to be done, doing it, and the run folder that holds the results."""

from volsal.batch.run import Outcome, Run

__all__ = ["Outcome", "Run"]
