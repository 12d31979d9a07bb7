"""A region's own certificate: it is renewed through its parent, as a device's is, and its servers take it over.

The region's clock says when it is due, as for the certificates of its devices. The former one is revoked when the new
one is first used, upward; connections below stay as they are, and later ones get the new certificate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import grpc

from cloud.trust.renewal import is_due
from edgefl.errors import CloudUnreachable
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.certificates.own import install, next_request
from edgefl.protocols.tls import Identity


class OwnCertificate:
    """The certificate in one folder. `renew` is called in a thread, `take_new` in the event loop."""

    def __init__(
        self, folder: Path, name: str, days: Callable[[], float], ask: Callable[[pb.RenewRequest], pb.RenewReply]
    ) -> None:
        self._folder, self._name, self._days, self._ask = folder, name, days, ask
        self._is_new = False

    def renew(self) -> bool:
        """Renew it if it is due; raises CloudUnreachable, ProtocolError, HomeError, OSError, ValueError.

        It is not due before the parent has said how long certificates are valid.
        """
        days = self._days()
        if days <= 0 or not is_due(Identity.in_folder(self._folder).cert.read_bytes(), days, time.time()):
            return False
        try:
            reply = self._ask(next_request(self._folder, self._name))
        except grpc.aio.AioRpcError as error:
            raise CloudUnreachable(
                f"the certificate of region {self._name!r} was not renewed by its parent: {error.details()}"
            ) from error
        install(self._folder, self._name, reply)
        self._is_new = True
        return True

    def take_new(self) -> bool:
        """Return whether there is a new certificate since the last call."""
        is_new, self._is_new = self._is_new, False
        return is_new
