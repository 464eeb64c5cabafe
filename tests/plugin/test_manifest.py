import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

npe2 = pytest.importorskip("npe2")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # npe2's and napari's own


@pytest.fixture
def manifest():
    return npe2.PluginManifest.from_file(str(files("volsal.plugin") / "napari.yaml"))


def test_the_manifest_is_valid_and_everything_in_it_is_there(manifest):
    pytest.importorskip("qtpy.QtWidgets")
    manifest.validate_imports()  # napari drops a plugin whose manifest is not valid, without a word


def test_it_offers_what_it_should(manifest):
    offered = manifest.contributions
    assert {widget.display_name for widget in offered.widgets} == {"Explain", "Audit browser", "Linked planes"}
    assert [sample.key for sample in offered.sample_data] == ["demo"]
    assert offered.writers[0].filename_extensions == [".nii.gz"]
    assert offered.readers[0].accepts_directories


def test_the_package_names_it_under_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package, name = project["entry-points"]["napari.manifest"]["volsal"].split(":")
    assert (files(package) / name).is_file()
    assert not any(
        "pyqt" in one.lower() or "pyside" in one.lower() for one in project["optional-dependencies"]["napari"]
    )


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ", "a.mha", "x/case.json"])
def test_napari_asks_this_reader_for_its_files(manifest, name):
    manager = npe2.PluginManager()
    manager.register(manifest)
    assert [reader.command for reader in manager.iter_compatible_readers([name])] == ["volsal.read"]
