import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from cloud.state.blobs import BlobStore
from edgefl.errors import BlobDamaged, NotFound, ProtocolError
from edgefl.trees import SpooledTree


def test_a_blob_is_named_by_its_sha256(tmp_path):
    ref = BlobStore(tmp_path / "blobs").put(b"abc")
    assert ref.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert ref.size == 3
    assert (tmp_path / "blobs" / ref.sha256).read_bytes() == b"abc"


def test_a_tree_is_stored_as_safetensors(tmp_path):
    blobs = BlobStore(tmp_path / "blobs")
    ref = blobs.put_tree({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7)})
    tree = SpooledTree(blobs.path(ref.sha256))
    assert tree["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tree["n"].shape == ()
    assert blobs.path(ref.sha256).stat().st_size == ref.size


def test_a_write_that_fails_leaves_nothing(tmp_path):
    blobs = BlobStore(tmp_path / "blobs")

    def fill(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        blobs.write(fill)
    assert list((tmp_path / "blobs").iterdir()) == []


def test_what_a_killed_process_left_is_removed_at_the_start(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ".incoming-x").write_bytes(b"half")
    BlobStore(tmp_path / "blobs")
    assert list((tmp_path / "blobs").iterdir()) == []


def test_a_second_process_removes_nothing_that_the_first_one_writes(tmp_path):
    BlobStore(tmp_path / "blobs")
    (tmp_path / "blobs" / ".incoming-x").write_bytes(b"half")
    BlobStore(tmp_path / "blobs", is_ours=False)
    assert [one.name for one in (tmp_path / "blobs").iterdir()] == [".incoming-x"]


@pytest.mark.parametrize("name", ["", "../secret", "A" * 64, "0" * 63, "0" * 65, "/etc/passwd"])
def test_only_a_digest_names_a_blob(tmp_path, name):
    with pytest.raises(ProtocolError, match="not a SHA-256"):
        BlobStore(tmp_path / "blobs").path(name)


def test_a_deleted_blob_can_be_read_on_by_who_has_it_open(tmp_path):
    blobs = BlobStore(tmp_path / "blobs")
    ref = blobs.put(b"abc")
    with blobs.path(ref.sha256).open("rb") as file:
        blobs.delete(ref.sha256)
        assert not blobs.has(ref.sha256)
        assert file.read() == b"abc"


def damage(path, at=0):
    """Turn one bit, as a disk does: size and times stay."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("known", [False, True])
def test_a_blob_with_one_other_bit_is_found_out(tmp_path, known):
    blobs = BlobStore(tmp_path / "blobs")
    ref = blobs.put_tree({"w": np.zeros(1000, np.float32)})
    if not known:
        blobs = BlobStore(tmp_path / "blobs")  # another process: it has not seen these bytes being written
    fast = blake3(blobs.path(ref.sha256).read_bytes()).hexdigest()
    assert blobs.check(ref.sha256) == fast
    assert blobs.check(ref.sha256) == fast
    damage(blobs.path(ref.sha256), at=2000)
    for _ in range(2):
        with pytest.raises(BlobDamaged, match=f"{ref.sha256[:16]}.* does not have the hash in its name"):
            blobs.check(ref.sha256)
    assert blobs.put_tree({"w": np.zeros(1000, np.float32)}) == ref  # sent again, it is whole
    assert blobs.check(ref.sha256) == fast


def test_a_blob_that_is_damaged_before_it_is_first_looked_at_is_found_out(tmp_path):
    ref = BlobStore(tmp_path / "blobs").put(b"abc")
    blobs = BlobStore(tmp_path / "blobs")
    damage(blobs.path(ref.sha256))
    with pytest.raises(BlobDamaged):
        blobs.check(ref.sha256)
    with pytest.raises(NotFound, match="no blob"):
        blobs.check("0" * 64)


SIZE = 64 << 20
CHECKS = f"""
import sys
from pathlib import Path
from cloud.state.blobs import BlobStore

def peak_kb():
    [line] = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1])

blobs = BlobStore(Path(sys.argv[1]))
before_kb = peak_kb()
blobs.check(sys.argv[2])
blobs.check(sys.argv[2])
assert peak_kb() - before_kb < {SIZE >> 12}, (before_kb, peak_kb())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks of memory are read from /proc")
def test_a_check_costs_no_memory_of_the_blobs_size(tmp_path):
    ref = BlobStore(tmp_path / "blobs").put(bytes(SIZE))
    done = subprocess.run(
        [sys.executable, "-c", CHECKS, tmp_path / "blobs", ref.sha256], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
