"""Lines between the agent and its serving process."""

from __future__ import annotations

import pytest

from edge_agent.serving import wire
from edgefl.errors import ProtocolError


@pytest.mark.parametrize(
    "message",
    [
        wire.ServingUp(pid=7),
        wire.StartServing(log_level=20),
        wire.LoadModel(id=1, name="digits", version=3, path="/a b/\n.onnx"),
        wire.ModelLoaded(id=1, error="no"),
        wire.SwitchModel(id=1),
        wire.ForgetModel(id=1),
        wire.DropModel(name="digits"),
        wire.SetReady(ready=True),
        wire.DisconnectClients(),
        wire.ModelStuck(model="digits"),
    ],
)
def test_a_message_is_one_line_and_comes_back(message):
    text = wire.line(message)
    assert text.count(b"\n") == 1
    assert wire.parse(text) == message


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"kind": "up"}', b'{"kind": "up", "x": 2}', b"[" * 9999])
def test_what_is_no_message(text):
    with pytest.raises(ProtocolError, match="not a message between agent and serving process"):
        wire.parse(text)
