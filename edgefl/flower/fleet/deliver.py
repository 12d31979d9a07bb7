"""A device's part in a relayed Flower app: pass one message to the bundle's ClientApp, and keep its state.

Runs in the agent's trainer. An exception of the ClientApp becomes an error reply, as in Flower; if the device
cannot call it at all (flwr not installed, not enough memory), an error is raised.
Invariant: a message that fails does not change the node's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgefl.errors import ConfigError, TaskError, out_of_memory
from edgefl.flower.apps.app import load_client_app, parse_value, require_flower


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeMessage:
    """One message, with the node's data for it."""

    app: str  # its name, in errors
    folder: Path  # where the bundle is unpacked
    order: Path
    envelope: str
    options: Mapping[str, str]  # the agent's data options
    state: Path | None  # as the previous message left it


@dataclass(frozen=True, slots=True)
class Outcome:
    """A reply, and the node's new state; None if the state did not change."""

    reply: bytes
    state: bytes | None


def deliver(given: NodeMessage) -> Outcome:
    """Return the ClientApp's answer; raises MissingExtra, ProtocolError, and TaskError for too little memory."""
    require_flower("a Flower app")
    from flwr.app import Context

    from edgefl.flower.fleet import wire
    from edgefl.flower.internals import ErrorCode, with_own_metadata
    from edgefl.flower.nodes import Delivery, attempt, failed

    message, run_config = wire.open_order(given.order.read_bytes(), given.envelope)
    request = with_own_metadata(message)  # the ClientApp may change it
    metadata = request.metadata
    context = Context(
        run_id=metadata.run_id,
        node_id=metadata.dst_node_id,
        node_config=wire.node_config(given.options, parse_value),
        state=wire.open_state(given.state.read_bytes() if given.state else b""),
        run_config=run_config,
    )
    code = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
    try:
        client_app = load_client_app(given.folder, given.app)
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        answer = attempt(given.app, client_app, Delivery(message, context))
    except (ConfigError, TaskError) as error:
        if out_of_memory(error):
            raise
        answer = failed(request, str(error), code)
    state = None if answer.state is None else wire.pack_state(answer.state)
    return Outcome(wire.pack_reply(answer.reply), state)
