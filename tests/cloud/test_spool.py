import pytest
from blake3 import blake3

from cloud.spool import Spool
from edgefl.errors import ProtocolError

DATA = bytes(range(256)) * 100


def sha(data: bytes) -> str:
    return blake3(data).hexdigest()


def test_an_update_appears_only_when_it_is_whole(tmp_path):
    spool = Spool(tmp_path / "spool")
    incoming = spool.incoming("job", 1, "cam", 0)
    incoming.write(DATA)
    assert not spool.file("job", 1, "cam").exists()
    name = incoming.finish(sha(DATA))
    assert spool.path(name).read_bytes() == DATA
    assert spool.received_bytes("job", 1, "cam") == 0


def test_a_cut_upload_goes_on_where_it_stopped(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.incoming("job", 1, "cam", 0)
    first.write(DATA[:1000])
    first.stop()
    assert spool.received_bytes("job", 1, "cam") == 1000
    second = spool.incoming("job", 1, "cam", 1000)
    second.write(DATA[1000:])
    assert spool.path(second.finish(sha(DATA))).read_bytes() == DATA


def test_an_upload_may_go_back_to_an_earlier_offset(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.incoming("job", 1, "cam", 0)
    first.write(b"x" * 500)
    first.stop()
    second = spool.incoming("job", 1, "cam", 0)
    second.write(DATA)
    assert spool.path(second.finish(sha(DATA))).read_bytes() == DATA


def test_a_wrong_hash_leaves_nothing(tmp_path):
    spool = Spool(tmp_path / "spool")
    incoming = spool.incoming("job", 1, "cam", 0)
    incoming.write(DATA)
    with pytest.raises(ProtocolError, match="BLAKE3"):
        incoming.finish(sha(b"other"))
    assert spool.received_bytes("job", 1, "cam") == 0
    assert not spool.file("job", 1, "cam").exists()


def test_a_dropped_round_leaves_the_others(tmp_path):
    spool = Spool(tmp_path / "spool")
    for number in (1, 2):
        incoming = spool.incoming("job", number, "cam", 0)
        incoming.write(DATA)
        incoming.finish(sha(DATA))
    spool.drop_round("job", 1)
    assert not spool.file("job", 1, "cam").exists()
    assert spool.file("job", 2, "cam").exists()
    spool.drop_job("job")
    assert not spool.file("job", 2, "cam").exists()


def test_a_finished_rounds_file_is_overwritten_by_a_shorter_update(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.incoming("job", 1, "cam", 0)
    first.write(DATA)
    inode = spool.path(first.finish(sha(DATA))).stat().st_ino
    spool.drop_round("job", 1)
    second = spool.incoming("job", 2, "cam", 0)
    second.write(DATA[:100])
    path = spool.path(second.finish(sha(DATA[:100])))
    assert path.read_bytes() == DATA[:100]
    assert path.stat().st_ino == inode


def test_a_cut_upload_into_a_reused_file_says_its_own_length(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.incoming("job", 1, "cam", 0)
    first.write(DATA)
    first.finish(sha(DATA))
    spool.drop_round("job", 1)
    second = spool.incoming("job", 2, "cam", 0)
    second.write(b"y" * 300)
    assert spool.received_bytes("job", 2, "cam") == 0
    second.stop()
    assert spool.received_bytes("job", 2, "cam") == 300


def test_after_a_kill_a_reused_file_is_not_taken_for_an_update(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.incoming("job", 1, "cam", 0)
    first.write(DATA)
    first.finish(sha(DATA))
    spool.drop_round("job", 1)
    second = spool.incoming("job", 2, "cam", 0)
    second.write(b"y")  # and no more: the process is killed here
    again = Spool(tmp_path / "spool")
    assert again.received_bytes("job", 2, "cam") == 0
    assert list((tmp_path / "spool").rglob("*.reused")) == []
