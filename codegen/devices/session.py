"""One connection from a searcher to a device, and what is asked over it."""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from codegen.devices.report import Report
from codegen.devices.wire import SILENCE_S, Wire, WireError, binding_of, checked, greet_device
from ir.errors import InputError

if TYPE_CHECKING:
    from codegen.devices.client import Device

CONNECT_S: Final = 10.0
_CHUNK_BYTES: Final = 1 << 20


class Session:
    """One connection to a device, greeted.

    Args:
        wire: The connection.
        device: Whose.
    """

    def __init__(self, wire: Wire, device: Device) -> None:
        self._wire, self._device, self.name = wire, device, ""

    @classmethod
    @contextmanager
    def open(cls, device: Device) -> Iterator[Session]:
        """Connect, check who is there, and show who connects.

        Raises:
            WireError: The device cannot be reached.
            InputError: It is another one, or has another secret.
        """
        try:
            end = socket.create_connection((device.host, device.port), CONNECT_S)
        except OSError as error:
            raise WireError(error.strerror or str(error)) from error
        try:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end = _encrypted(end, device)
            wire = Wire(end)
            greet_device(wire, device.secret, binding_of(end))
            yield cls(wire, device)
        finally:
            end.close()

    def report(self) -> Report:
        """Return what the device says of itself."""
        return Report.of(self._ask({"op": "status"}).get("device"))

    def hold(self) -> None:
        """Take the lease, or part in one that this holder has.

        Raises:
            TargetUnavailable: Another one keeps the device.
        """
        holder = f"{_user()}@{socket.gethostname()}"
        request = {"op": "hold", "token": self._device.token, "holder": holder, "wait_s": self._device.wait_s}

        def beat(message: dict[str, Any]) -> None:
            lease = message.get("lease")
            if isinstance(lease, dict):
                self._device.tell(f"waiting for {lease.get('holder')}, who has the device since {lease.get('since')}")

        self._ask(request, beat)

    def keep(self) -> None:
        """Say that this is still here."""
        self._ask({"op": "keep"})

    def release(self) -> None:
        """Give up the part in the lease; nothing can be asked after that."""
        with suppress(WireError):
            self._ask({"op": "release"})

    def send_missing(self, paths: Sequence[Path]) -> list[str]:
        """Send those files that the device does not have.

        Returns:
            The digest of each.

        Raises:
            InputError: One cannot be read, or is too large for the device.
        """
        self.name = self.report().name
        files: dict[str, bytes] = {}
        digests: list[str] = []
        for path in paths:
            data = _read(path)
            digests.append(hashlib.sha256(data).hexdigest())
            files[digests[-1]] = data
        missing = self._ask({"op": "missing", "artifacts": list(files)}).get("missing")
        for digest in missing if isinstance(missing, list) else []:
            data = memoryview(files[digest])
            self._ask({"op": "put", "sha256": digest, "size": len(data)})
            chunks = (data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES))
            self._wire.send({"op": "file"}, chunks, len(data))
            self._answer()
        return digests

    def measure(self, digests: Sequence[str], options: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the record of each artifact."""
        found = self._ask({"op": "measure", "artifacts": list(digests), **options}).get("latencies")
        if not isinstance(found, list) or len(found) != len(digests):
            raise WireError("another number of records than of artifacts")
        return found

    def _ask(self, request: dict[str, Any], beat: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        self._wire.send(request)
        return self._answer(beat)

    def _answer(self, beat: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        while True:
            message = checked(self._wire.receive(SILENCE_S))
            if "beat" not in message:
                return message
            if beat is not None:
                beat(message)


def _encrypted(end: socket.socket, device: Device) -> socket.socket:
    """Wrap a connection for TLS where the device is to be known by a certificate."""
    if device.tls_ca is None and device.tls_fingerprint is None:
        return end
    context = ssl.create_default_context(cafile=device.tls_ca)
    if device.tls_fingerprint is not None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # that one certificate alone will do
    try:
        wrapped = context.wrap_socket(end, server_hostname=device.host)
    except ssl.SSLCertVerificationError as error:
        hint = "give its own certificate as --tls-ca, or its SHA-256 as --tls-fingerprint"
        raise InputError(
            "the device's certificate is not trusted", where=device.address, found=error.verify_message, hint=hint
        ) from error
    except (OSError, ValueError) as error:
        raise WireError(f"no TLS: {error}") from error
    found = hashlib.sha256(wrapped.getpeercert(binary_form=True) or b"").hexdigest()
    if device.tls_fingerprint not in (None, found):
        wrapped.close()
        raise InputError(
            "this is another device, or somebody in between",
            where=device.address,
            expected=f"a certificate with the SHA-256 {device.tls_fingerprint}",
            found=found,
        )
    return wrapped


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError("cannot read the artifact", where=str(path), found=error.strerror) from error


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as in containers
        return str(os.getuid())
