"""What a running relay makes of a message."""

import hashlib

import pytest
from blake3 import blake3

from cloud.dataplane.live_relay import MAX_MESSAGE_BYTES, LiveRelay
from cloud.state.blobs import BlobStore
from cloud.state.relay_rows import RelayMessage
from edgefl.errors import ConfigError
from edgefl.protocols.messages import Signed

CONTENT = b"what a message holds"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def relay(tmp_path):
    one = LiveRelay("relay-1", Signed(text="{}", key_id="k", signature="s"), BlobStore(tmp_path / "relay-1"), 0.0, 0.0)
    one.contents.put(CONTENT)
    return one


def message(**changes):
    facts = {"number": 7, "device": "a", "envelope": "e", "content_sha256": SHA256, "expires_s": 9.0}
    return RelayMessage(**facts | changes)


def test_a_plan_names_what_the_message_holds_and_how_long_it_is_wanted(relay):
    asked = relay.assignment(message(), 30.0)
    assert (asked.job, asked.round, asked.envelope, asked.deadline_s) == ("relay-1", 7, "e", 30.0)
    assert (asked.content.sha256, asked.content.size) == (SHA256, len(CONTENT))
    assert (asked.content_blake3, asked.max_update_bytes) == (blake3(CONTENT).hexdigest(), MAX_MESSAGE_BYTES)


def test_what_messages_share_is_hashed_once(relay):
    first = relay.assignment(message(), 30.0)
    relay.contents.path(SHA256).unlink()
    assert relay.assignment(message(number=8), 30.0).content_blake3 == first.content_blake3


def test_a_message_whose_content_was_not_sent_is_refused(relay):
    with pytest.raises(ConfigError, match=r"content 1{16}\.\.\. of message 7 is missing; upload it first"):
        relay.assignment(message(content_sha256="1" * 64), 30.0)
