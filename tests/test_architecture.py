"""The package's own shape: what `import volsal` costs.  Who may import whom is import-linter's, in pyproject.toml."""

import subprocess
import sys

import pytest

# Not pydicom: nibabel imports it wherever it is installed.
HEAVY = {"napari", "qtpy", "vispy", "matplotlib", "monai", "dask", "highdicom", "SimpleITK"}


def loaded_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import volsal; volsal.Explainer, volsal.GradCAM, volsal.resample, volsal.read_scan",
        "import volsal.batch",
        "import volsal.viewer.layers, volsal.report.figures",
    ],
)
def test_the_core_loads_no_viewer_and_no_monai(code):
    assert not loaded_after(code) & HEAVY


def test_the_command_line_answers_without_torch():
    assert not loaded_after("import volsal.cli") & (HEAVY | {"torch", "nibabel"})


def test_the_demo_needs_no_test_package():
    code = "import sys; sys.modules['pytest'] = None\nfrom volsal.demo.cohort import head; head()"
    loaded_after(code)


def test_that_check_would_notice():
    assert "sqlite3" in loaded_after("import sqlite3")
