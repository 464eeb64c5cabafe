"""The notebooks of examples/ run as they stand, and are kept without what running them gives."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [output for cell in book.cells for output in cell.get("outputs", ())]
    # What a notebook tells on stderr, such as a warning, its reader would have to wonder about.
    assert [output.text for output in said if output.get("name") == "stderr"] == []
    if path.stem == "first_explanation":
        shown = [output.data["text/html"] for output in said if "text/html" in output.get("data", {})]
        assert any("data:image/png;base64," in html and "lesion" in html for html in shown)
