"""Whatever is lost, and whenever a stream breaks, both ends are equal after the next complete stream."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefl.errors import ProtocolError
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.tiers import mirror as mirrors
from edgefl.protocols.tiers.mirror import MAX_KEY_CHARS, Mirror, MirrorCopy

KEYS = st.sampled_from(["a/1", "a/2", "b/1", "b/2"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, st.binary(max_size=2)),
        st.tuples(st.just("delete"), KEYS),
        st.tuples(st.just("replace"), st.sampled_from(["a/", "b/"]), st.dictionaries(KEYS, st.binary(max_size=2))),
        st.tuples(st.just("read"), st.integers(1, 5)),
        st.tuples(st.just("connect")),
    ),
    max_size=40,
)


class Reader:
    """A copy, what it was told of changes, and the stream that it reads now."""

    def __init__(self, mirror):
        self.mirror, self.seen = mirror, {}
        self.copy = MirrorCopy(self.note)
        self.stream = None

    def note(self, key, value):
        assert self.seen.get(key) != value, f"{key} was told twice"
        if value is None:
            del self.seen[key]
        else:
            self.seen[key] = value

    def connect(self):
        self.stream = self.mirror.items()
        self.copy.begin()

    async def read(self, most=1000):
        """Take up to so many items; stops where the writer has nothing to say."""
        for _ in range(most):
            try:
                item = await asyncio.wait_for(anext(self.stream), 0.01)
            except (TimeoutError, StopAsyncIteration):
                self.stream = None  # a wait that was cut off has ended the generator
                return
            self.copy.take(item)


def in_turn(steps):
    """Execute steps on a mirror that is read by a stream that breaks; return the mirror's entries and the copy's."""

    async def running():
        mirror, model = Mirror(), {}
        reader = Reader(mirror)
        reader.connect()
        for step in steps:
            match step:
                case ("set", key, value):
                    mirror.set(key, value)
                    model[key] = value
                case ("delete", key):
                    mirror.delete(key)
                    model.pop(key, None)
                case ("replace", prefix, values):
                    values = {key: value for key, value in values.items() if key.startswith(prefix)}
                    mirror.replace(prefix, values)
                    model = {key: value for key, value in model.items() if not key.startswith(prefix)} | values
                case ("read", most) if reader.stream is not None:
                    await reader.read(most)
                case ("connect",):
                    reader.connect()
        last = mirror.items()
        reader.copy.begin()
        async for item in last:
            reader.copy.take(item)
            if item.complete:
                break
        return model, reader.seen, sorted(mirror.keys())

    return asyncio.run(running())


@given(STEPS)
def test_both_ends_are_equal_after_a_complete_stream(steps):
    model, seen, keys = in_turn(steps)
    assert seen == model
    assert keys == sorted(model)


def test_an_entry_that_is_deleted_before_the_stream_is_complete_never_shows():
    async def running():
        mirror, told = Mirror(), []
        mirror.set("a", b"1")
        mirror.set("b", b"2")
        copy = MirrorCopy(lambda key, value: told.append((key, value)))
        stream = mirror.items()
        copy.take(await anext(stream))
        mirror.delete("b")
        copy.take(await anext(stream))
        copy.take(await anext(stream))
        return told

    assert asyncio.run(running()) == [("a", b"1")]


def test_changes_arrive_while_the_stream_runs_and_only_the_latest_value_of_each():
    async def running():
        mirror, told = Mirror(), []
        stream = mirror.items()
        copy = MirrorCopy(lambda key, value: told.append((key, value)))
        copy.take(await anext(stream))
        for number in range(100):
            mirror.set("a", str(number).encode())
        mirror.set("b", b"1")
        mirror.delete("b")
        for _ in range(2):
            copy.take(await anext(stream))
        return told

    assert asyncio.run(running()) == [("a", b"99")]


def test_a_newer_stream_ends_the_older_one():
    async def running():
        mirror = Mirror()
        first = mirror.items()
        assert (await anext(first)).complete
        ended = asyncio.create_task(anext(first, None))
        await asyncio.sleep(0)
        second = mirror.items()
        assert (await anext(second)).complete
        assert await asyncio.wait_for(ended, 5) is None
        mirror.set("a", b"1")
        return await asyncio.wait_for(anext(second), 5)

    assert asyncio.run(running()).key == "a"


def test_a_mirror_without_a_reader_keeps_no_changes():
    """A region that is away for weeks costs what its entries cost, not what has changed since."""

    async def running():
        mirror = Mirror()
        stream = mirror.items()
        await anext(stream)
        await stream.aclose()
        for number in range(100):
            mirror.set(f"work/{number}", b"1")
            mirror.delete(f"work/{number}")
        return mirror

    mirror = asyncio.run(running())
    assert mirror.keys() == []
    assert mirror.pending() == 0


def test_a_value_that_is_a_function_is_called_when_it_is_sent_and_none_deletes():
    async def running():
        mirror, left, items = Mirror(), [b"10"], []
        mirror.set("left", lambda: left[0])
        mirror.set("gone", lambda: None)
        left[0] = b"3"
        stream = mirror.items()
        while not items or not items[-1].complete:
            items.append(await anext(stream))
        return items

    first, second, _ = asyncio.run(running())
    assert (first.key, first.value, first.deleted) == ("left", b"3", False)
    assert (second.key, second.deleted) == ("gone", True)


def test_until_a_new_stream_is_complete_the_former_entries_stay():
    told = []
    copy = MirrorCopy(lambda key, value: told.append((key, value)))
    for item in (pb.TierItem(key="a", value=b"1"), pb.TierItem(complete=True)):
        copy.take(item)
    copy.begin()
    assert not copy.is_complete
    copy.take(pb.TierItem(key="b", value=b"2"))
    assert told == [("a", b"1")]
    copy.take(pb.TierItem(complete=True))
    assert copy.is_complete
    assert told == [("a", b"1"), ("a", None), ("b", b"2")]
    copy.clear()
    assert told[3:] == [("b", None)]


def test_what_a_hostile_end_sends_is_limited(monkeypatch):
    copy = MirrorCopy(lambda _key, _value: None)
    with pytest.raises(ProtocolError, match=f"a key of {MAX_KEY_CHARS + 1} characters"):
        copy.take(pb.TierItem(key="k" * (MAX_KEY_CHARS + 1)))
    monkeypatch.setattr(mirrors, "MAX_ENTRIES", 3)
    for number in range(3):
        copy.take(pb.TierItem(key=str(number), value=b"x"))
    copy.take(pb.TierItem(key="1", value=b"y"))  # not one more
    with pytest.raises(ProtocolError, match="more than 3 entries"):
        copy.take(pb.TierItem(key="3"))
    copy.take(pb.TierItem(complete=True))
    with pytest.raises(ProtocolError, match="more than 3 entries"):
        copy.take(pb.TierItem(key="3", value=b"x"))
    copy.take(pb.TierItem(key="3", deleted=True))  # of nothing: adds nothing
