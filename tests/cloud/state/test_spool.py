import errno
import io
import threading

import numpy as np
import pytest
from blake3 import blake3

from cloud.state import spool as module
from cloud.state.spool import Arrival, Spool
from edgefl.errors import ProtocolError, UploadCutOff
from edgefl.trees import write_tree

DATA = bytes(range(256)) * 100


def sha(data: bytes) -> str:
    return blake3(data).hexdigest()


def keep(incoming, data=DATA):
    """Finish an upload as the service does; return its name."""
    incoming.finish(sha(data))
    incoming.place()
    return incoming.name


def test_an_update_appears_only_when_it_is_whole(tmp_path):
    spool = Spool(tmp_path / "spool")
    incoming = spool.incoming("job", 1, "cam", 0)
    incoming.write(DATA)
    assert not spool.file("job", 1, "cam").exists()
    incoming.finish(sha(DATA))
    assert not spool.file("job", 1, "cam").exists()
    incoming.place()
    assert spool.path(incoming.name).read_bytes() == DATA
    assert spool.received_bytes("job", 1, "cam") == 0


def test_a_cut_upload_goes_on_where_it_stopped(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.incoming("job", 1, "cam", 0)
    first.write(DATA[:1000])
    first.stop()
    assert spool.received_bytes("job", 1, "cam") == 1000
    second = spool.incoming("job", 1, "cam", 1000)
    second.write(DATA[1000:])
    assert spool.path(keep(second)).read_bytes() == DATA


def test_an_upload_may_go_back_to_an_earlier_offset(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.incoming("job", 1, "cam", 0)
    first.write(b"x" * 500)
    first.stop()
    second = spool.incoming("job", 1, "cam", 0)
    second.write(DATA)
    assert spool.path(keep(second)).read_bytes() == DATA


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
        keep(incoming)
    spool.drop_round("job", 1)
    assert not spool.file("job", 1, "cam").exists()
    assert spool.file("job", 2, "cam").exists()
    spool.drop_job("job")
    assert not spool.file("job", 2, "cam").exists()


def test_a_finished_rounds_file_is_overwritten_by_a_shorter_update(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.incoming("job", 1, "cam", 0)
    first.write(DATA)
    inode = spool.path(keep(first)).stat().st_ino
    spool.drop_round("job", 1)
    second = spool.incoming("job", 2, "cam", 0)
    second.write(DATA[:100])
    path = spool.path(keep(second, DATA[:100]))
    assert path.read_bytes() == DATA[:100]
    assert path.stat().st_ino == inode


def test_a_cut_upload_into_a_reused_file_says_its_own_length(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.incoming("job", 1, "cam", 0)
    first.write(DATA)
    keep(first)
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
    keep(first)
    spool.drop_round("job", 1)
    second = spool.incoming("job", 2, "cam", 0)
    second.write(b"y")  # and no more: the process is killed here
    again = Spool(tmp_path / "spool")
    assert again.received_bytes("job", 2, "cam") == 0
    assert list((tmp_path / "spool").rglob("*~reused")) == []


def test_a_newer_upload_cuts_the_older_off_and_what_was_placed_stays(tmp_path):
    spool = Spool(tmp_path / "spool")
    old = spool.incoming("job", 1, "cam", 0)
    old.write(b"x" * 500)
    new = spool.incoming("job", 1, "cam", 0)
    with pytest.raises(UploadCutOff, match="a newer one has started"):
        old.write(b"x")
    spool.done_with(old)
    new.write(DATA)
    path = spool.path(keep(new))
    for late in (lambda: old.write(b"x"), lambda: old.finish(sha(b"x")), old.place):
        with pytest.raises(UploadCutOff):
            late()
    third = spool.incoming("job", 1, "cam", 0)  # the device goes on sending what is here
    third.write(b"poison")
    spool.done_with(third)
    assert path.read_bytes() == DATA


def test_a_finished_upload_is_not_written_to_before_it_is_placed(tmp_path):
    spool = Spool(tmp_path / "spool")
    old = spool.incoming("job", 1, "cam", 0)
    old.write(DATA)
    old.finish(sha(DATA))
    new = spool.incoming("job", 1, "cam", 0)
    with pytest.raises(UploadCutOff):
        old.place()
    new.write(DATA)
    assert spool.path(keep(new)).read_bytes() == DATA


def test_an_offset_beyond_what_is_here_ends_at_once(tmp_path):
    spool = Spool(tmp_path / "spool")
    with pytest.raises(UploadCutOff, match="job/1/cam has 0 bytes, expected 5"):
        spool.incoming("job", 1, "cam", 5)


def test_a_round_that_is_dropped_cuts_its_uploads_off(tmp_path):
    spool = Spool(tmp_path / "spool")
    incoming = spool.incoming("job", 1, "cam", 0)
    incoming.write(DATA)
    spool.drop_round("job", 1)
    with pytest.raises(UploadCutOff, match="the round is over"):
        incoming.finish(sha(DATA))
    spool.done_with(incoming)
    assert not (tmp_path / "spool" / "job" / "1").exists()


def test_a_device_whose_name_ends_like_a_part_has_a_file_of_its_own(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.incoming("job", 1, "cam", 0)
    first.write(DATA)
    for name in ("cam.part", "cam.reused"):
        other = spool.incoming("job", 1, name, 0)
        other.write(b"y")
        keep(other, b"y")
    assert spool.path(keep(first)).read_bytes() == DATA


def test_updates_of_jobs_that_are_gone_are_forgotten(tmp_path):
    spool = Spool(tmp_path / "spool")
    for job in ("gone", "kept"):
        incoming = spool.incoming(job, 1, "cam", 0)
        incoming.write(DATA)
        keep(incoming)
    spool.keep_only(["kept"])
    assert not spool.file("gone", 1, "cam").exists()
    assert spool.file("kept", 1, "cam").exists()


def arrival(spool: Spool, offset: int = 0) -> Arrival:
    return Arrival(spool, "job", 1, "a", offset)


def test_an_upload_is_written_one_chunk_behind_and_nothing_before_its_first(tmp_path):
    spool = Spool(tmp_path / "spool")
    upload = arrival(spool)
    assert not spool.file("job", 1, "a").parent.exists()
    upload.last = memoryview(b"abc")
    upload.write()
    upload.last = memoryview(b"defg")
    assert spool.received_bytes("job", 1, "a") == 3
    incoming = upload.write()
    incoming.finish(blake3(b"abcdefg").hexdigest())
    incoming.place()
    upload.end()
    assert spool.path(incoming.name).read_bytes() == b"abcdefg"


@pytest.mark.parametrize("written", [b"", b"abc"])
def test_an_upload_that_ends_early_keeps_what_has_come(tmp_path, written):
    spool = Spool(tmp_path / "spool")
    upload = arrival(spool)
    if written:
        upload.last = memoryview(written)
        upload.write()
    upload.last = memoryview(b"de")
    upload.end()
    upload.end()
    assert upload.ended
    assert spool.received_bytes("job", 1, "a") == len(written) + 2
    with pytest.raises(UploadCutOff):
        upload.write()


def test_an_upload_that_a_newer_one_has_cut_off_writes_no_more(tmp_path):
    spool = Spool(tmp_path / "spool")
    older, newer = arrival(spool), arrival(spool)
    older.last = memoryview(b"abc")
    older.write()
    newer.last = memoryview(b"xy")
    newer.write()
    older.last = memoryview(b"de")
    older.end()
    newer.end()
    assert spool.received_bytes("job", 1, "a") == 2


def test_what_an_owed_device_has_sent_so_far_is_kept_and_its_upload_goes_on(tmp_path):
    spool = Spool(tmp_path / "spool")
    for device in ("done", "cut"):
        incoming = spool.incoming("job", 1, device, 0)
        incoming.write(DATA)
        keep(incoming) if device == "done" else incoming.stop()
    sending, other = spool.incoming("job", 1, "slow", 0), spool.incoming("job", 1, "other", 0)
    sending.write(DATA[:100])
    spool.drop_round("job", 1, owed=["cut", "slow"])
    assert not spool.file("job", 1, "done").exists()
    assert spool.received_bytes("job", 1, "cut") == len(DATA)
    sending.write(DATA[100:])
    assert spool.path(keep(sending)).read_bytes() == DATA
    with pytest.raises(UploadCutOff):
        other.write(DATA)
    spool.drop_round("job", 1)
    assert not (tmp_path / "spool" / "job" / "1").exists()


def encoded(value: float, size: int) -> memoryview:
    file = io.BytesIO()
    write_tree({"w": np.full(size, value, np.float32)}, file)
    return memoryview(file.getvalue())


def test_small_updates_are_parts_of_one_file(tmp_path):
    spool, sizes = Spool(tmp_path), (3, 5000, 0)
    names = spool.pack("job", 1, [encoded(float(number), size) for number, size in enumerate(sizes)])
    [path] = (tmp_path / "job" / "1").iterdir()
    assert {one.partition(":")[0] for one in names} == {str(path.relative_to(tmp_path))}
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        tree = spool.tree(name)
        np.testing.assert_array_equal(tree["w"], np.full(size, number, np.float32))
        np.testing.assert_array_equal(tree.read("w", slice(0, 2)), np.full(min(size, 2), number, np.float32))
    again = spool.pack("job", 1, [encoded(7.0, 3)])
    assert again[0].partition(":")[0] not in {one.partition(":")[0] for one in names}
    held = spool.tree(names[1])["w"]
    spool.drop_round("job", 1)
    assert not (tmp_path / "job" / "1").exists()
    assert held[-1] == 1.0  # who reads it still has it


def test_a_packed_file_takes_the_place_of_a_finished_rounds_file(tmp_path):
    spool = Spool(tmp_path)
    spool.pack("job", 1, [encoded(1.0, 50_000)])
    spool.drop_round("job", 1)
    [name] = spool.pack("job", 2, [encoded(2.0, 10)])
    assert spool.path(name.partition(":")[0]).stat().st_size == len(encoded(2.0, 10))
    np.testing.assert_array_equal(spool.tree(name)["w"], np.full(10, 2.0, np.float32))
    assert list((tmp_path / ".free").iterdir()) == []


def test_a_packed_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    spool = Spool(tmp_path)

    def full(_descriptor, _data, _offset):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(module.os, "pwrite", full)
    with pytest.raises(OSError, match="no space"):
        spool.pack("job", 1, [encoded(1.0, 10)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_packed_file_that_was_cut_is_no_tree(tmp_path):
    spool = Spool(tmp_path)
    [_, name] = spool.pack("job", 1, [encoded(1.0, 10), encoded(2.0, 10)])
    path = spool.path(name.partition(":")[0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ProtocolError, match="a file of trees has"):
        spool.tree(name)


def test_a_round_is_dropped_while_updates_are_packed(tmp_path):
    spool, folder, done = Spool(tmp_path), tmp_path / "job" / "1", threading.Event()
    errors = []

    def pack_on():
        while not done.is_set():
            try:
                spool.pack("job", 1, [encoded(1.0, 10)] * 3)
            except UploadCutOff as error:
                errors.append(error)

    packing = threading.Thread(target=pack_on)
    packing.start()
    try:
        for _ in range(50):  # among many files, so that it takes a while
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(200):
                (folder / f"cam-{number}").write_bytes(b"an update")
            spool.drop_round("job", 1)
    finally:
        done.set()
        packing.join()
    spool.drop_job("job")
    assert not (tmp_path / "job").exists()


def test_a_file_of_which_nothing_is_accepted_is_deleted(tmp_path):
    spool = Spool(tmp_path)
    one, other = (spool.pack("job", 1, [encoded(1.0, 10)])[0] for _ in range(2))
    spool.discard(one)
    assert spool.tree(other)["w"].shape == (10,)
    spool.discard(other)
    assert list((tmp_path / "job").iterdir()) == []
    spool.discard(other)  # it is gone already
