import gzip
import stat

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from isal import igzip, isal_zlib

from volsal.scans import Scan, read_scan
from volsal.scans.write import GEOMETRY_FIELDS, WriteError, map_header, replacing, require_writable, write_map


def test_the_map_has_the_scans_geometry_to_the_byte_and_nothing_else_of_its_header(scan_file, tmp_path):
    path = scan_file()
    image = nib.load(path)
    turned = image.affine.copy()
    turned[0, 3] += 0.05
    image.set_sform(turned, code=4)  # two forms, slightly apart, with codes of their own
    image.set_qform(image.get_qform(), code=1)
    image.header["descrip"] = b"DOE^JANE"
    image.header["db_name"] = b"1234"
    image.header["aux_file"] = b"secret"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, path)
    scan = read_scan(path)
    values = np.random.default_rng(0).normal(size=scan.grid.shape).astype(np.float32)
    out = tmp_path / "map.nii.gz"
    write_map(out, values, map_header(scan, "grad-cam", "volsal grad-cam layer4", (0.0, 2.5)))
    written = nib.load(out)
    for name in (*GEOMETRY_FIELDS, "dim"):
        assert written.header[name].tobytes() == nib.load(path).header[name].tobytes(), name
    assert written.header["pixdim"][:4].tobytes() == nib.load(path).header["pixdim"][:4].tobytes()
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), values)
    assert written.get_data_dtype() == np.float32
    assert (written.header["cal_min"], written.header["cal_max"]) == (0, 2.5)
    assert written.header.get_intent()[::2] == ("estimate", "grad-cam")
    assert not written.header.extensions

    everything = gzip.decompress(out.read_bytes())
    assert not any(word in everything for word in (b"DOE", b"Doe", b"1234", b"secret"))


def test_simpleitk_places_the_map_where_the_scan_lies(scan_file, tmp_path):
    path = scan_file()
    scan = read_scan(path)
    write_map(tmp_path / "m.nii.gz", scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
    one, other = sitk.ReadImage(str(path)), sitk.ReadImage(str(tmp_path / "m.nii.gz"))
    index = (5, 3, 11)
    np.testing.assert_allclose(one.TransformIndexToPhysicalPoint(index), other.TransformIndexToPhysicalPoint(index))
    x, y, z = other.TransformIndexToPhysicalPoint(index)
    np.testing.assert_allclose((-x, -y, z), scan.grid.world(index), atol=1e-4)  # ITK counts to left and posterior


def test_a_left_handed_qform_is_not_mirrored(scan_file, tmp_path):
    path = scan_file(affine=np.diag([-2.0, 2.5, 3.0, 1.0]))  # qfac, the sign in pixdim[0], is -1
    image = nib.load(path)
    image.set_sform(None, 0)
    nib.save(image, path)
    scan = read_scan(path)
    write_map(tmp_path / "m.nii.gz", scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
    np.testing.assert_allclose(nib.load(tmp_path / "m.nii.gz").affine, image.affine)
    assert nib.load(tmp_path / "m.nii.gz").header["pixdim"][0] == -1


def test_a_scan_made_in_memory_gets_both_forms(tmp_path, oblique):
    scan = Scan(np.zeros(oblique.shape, np.float32), oblique)
    write_map(tmp_path / "m.nii.gz", scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
    header = nib.load(tmp_path / "m.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_sform(), oblique.affine, atol=1e-5)
    np.testing.assert_allclose(header.get_qform(), oblique.affine, atol=1e-4)


def test_the_same_map_is_the_same_file(tmp_path, oblique):
    scan = Scan(np.ones(oblique.shape, np.float32), oblique)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_map(tmp_path / name, scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("old")

    def break_off():
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        break_off()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_rights_that_any_new_file_gets(tmp_path):
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("x")
    (tmp_path / "b").write_text("x")
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert rights[0] == rights[1]


def test_what_was_read_back_wrong_is_not_kept(tmp_path, oblique, monkeypatch):
    scan = Scan(np.ones(oblique.shape, np.float32), oblique)
    sound = isal_zlib.compressobj

    class Faulty:
        """A compressor that gets one bit wrong, and would then write the checksum of what it made."""

        def __init__(self, *settings):
            self.sound = sound(*settings)

        def compress(self, content):
            flipped = bytearray(content)
            flipped[-1] ^= 1
            return self.sound.compress(bytes(flipped))

        def flush(self):
            return self.sound.flush()

    monkeypatch.setattr(isal_zlib, "compressobj", Faulty)
    with pytest.raises(WriteError, match="not the ones written"):
        write_map(tmp_path / "m.nii.gz", scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [-30, -6, None], ids=["voxels", "checksum", "end"])
def test_what_the_disk_did_not_keep_is_told(at, tmp_path, oblique, monkeypatch):
    """The bytes are changed behind the writer's back, between writing and reading back."""
    scan = Scan(np.arange(693, dtype=np.float32).reshape(oblique.shape), oblique)
    sound = igzip.open

    def after_damage(path, mode):
        content = bytearray(path.read_bytes())
        if at is None:
            del content[-20:]
        else:
            content[at] ^= 4
        path.write_bytes(content)
        return sound(path, mode)

    monkeypatch.setattr(igzip, "open", after_damage)
    with pytest.raises(WriteError, match=r"not the ones written|could not be written: CRC"):
        write_map(tmp_path / "m.nii.gz", scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="cannot write there"):
        require_writable(tmp_path / "file" / "out")
    require_writable(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("field", "value"), [("pixdim", [1, 0, 0, 0]), ("pixdim", [0, 2, 2, 2]), ("pixdim", [1, -2, 2, 2])]
)
def test_an_odd_pixdim_beside_a_sound_sform_is_written_as_it_stands(field, value, scan_file, tmp_path):
    """nibabel mends such a header where it reads one, which is no reason to doubt what was written."""
    path = scan_file(affine=np.diag([2.0, 2, 2, 1]))
    content = bytearray(path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes()))
    content[76:92] = np.array(value, "<f4").tobytes()
    path = tmp_path / "odd.nii"
    path.write_bytes(content)
    scan = read_scan(path)
    write_map(tmp_path / "m.nii", scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
    written = gzip.decompress((tmp_path / "m.nii").read_bytes())
    assert written[80:92] == content[80:92]
    assert written[76:80] == np.array(value[0] or 1, "<f4").tobytes()  # 0 counts as 1
    assert written[252:328] == content[252:328]
