from functools import cache

import planted
import pytest


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """A function: so many phantoms of a cue, whose files are written once."""
    folder = tmp_path_factory.mktemp("scans")
    return cache(lambda cue, count=12, masks=False: planted.cases(folder, cue, count, masks=masks))
