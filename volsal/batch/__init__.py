"""Many scans: what is to be done, doing it, and the run folder that holds the results.

=============  ========================================================================================
``cases``      which cases a config names; ``tables`` reads CSV and TSV; ``plan`` says what would be done
``run``        a run from beginning to end: lock, signals, log, order
``engine``     who does the cases: this process, or a Dask cluster
``worker``     what one process does: read, compute, write, and what becomes of faults
``recipe``     what a result depends on; ``attempts`` finds cases that kill processes
=============  ========================================================================================
"""

from volsal.batch.run import Run, Tally
from volsal.batch.worker import Outcome

__all__ = ["Outcome", "Run", "Tally"]
