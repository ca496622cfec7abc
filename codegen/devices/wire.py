"""Messages between a device and who measures on it.

A message is `NAS1`, two lengths, a JSON object, and raw bytes where the object announces a file. Before the first one
the two sides prove to each other that they know the shared secret (HMAC-SHA256 over both sides' random numbers and the
TLS certificate), and every message after that carries a code under a key of this connection and its place in the
sequence: nobody on the way can change, repeat or insert one. What is secret needs TLS or an SSH tunnel besides. Only
JSON is parsed of what the other side sends, never a pickle.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final, TypeAlias

from ir import errors
from ir.errors import InputError, NasError

VERSION: Final = 1
BEAT_S: Final = 1.0
"""How often a device that works or lets wait says that it is there."""
SILENCE_S: Final = 30.0
"""After so long without a byte the other side counts as gone."""
HANDSHAKE_S: Final = 10.0

_MAGIC: Final = b"NAS1"
_HEAD: Final = struct.Struct("!4sIQ")
_FIRST_JSON_BYTES: Final = 4096  # of who has not proved anything
_JSON_BYTES: Final = 1 << 20
_TAG_BYTES: Final = 32
_CHUNK_BYTES: Final = 1 << 20
_TLS_ALERT: Final = b"\x15"
_TEXT_CHARACTERS: Final = 4000
_SHORTEST_SECRET: Final = 16  # a proof that was listened to can be guessed at, offline

Take: TypeAlias = Callable[[bytes], object]
OpenBody: TypeAlias = Callable[[dict[str, Any], int], Take]


class WireError(ConnectionError):
    """The other side is gone, or says what it should not; nothing more can be read."""


class Wire:
    """One end of a connection.

    Args:
        end: Connected socket, wrapped for TLS or not.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._keys: tuple[bytes, bytes] | None = None
        self._sent = self._received = 0
        self._largest_json = _FIRST_JSON_BYTES

    def protect(self, keys: tuple[bytes, bytes] | None) -> None:
        """Take the other side as proven: allow longer messages, and put codes on them where there are keys.

        Args:
            keys: Of what is sent and of what is received; None on a device without a secret.
        """
        self._keys, self._largest_json = keys, _JSON_BYTES

    def send(self, message: Mapping[str, Any], body: Iterable[bytes | memoryview] = (), body_bytes: int = 0) -> None:
        """Send a message, with the chunks of a file behind it.

        Raises:
            WireError: The other side is gone.
        """
        text = json.dumps(message, allow_nan=False).encode()
        head = _HEAD.pack(_MAGIC, len(text), body_bytes)
        code = self._code(0, self._sent, head + text)
        self._sent += 1
        try:
            self._socket.settimeout(SILENCE_S)
            self._socket.sendall(head + text)
            for chunk in body:
                self._socket.sendall(chunk)
                if code is not None:
                    code.update(chunk)
            if code is not None:
                self._socket.sendall(code.digest())
        except (OSError, ValueError) as error:
            raise WireError(f"cannot send: {error}") from error

    def receive(
        self,
        timeout_s: float = SILENCE_S,
        *,
        largest_body: int = 0,
        open_body: OpenBody | None = None,
    ) -> dict[str, Any]:
        """Return the next message.

        Args:
            timeout_s: Time until it must be there, its file excepted.
            largest_body: Largest file allowed, bytes.
            open_body: Told the message and the bytes of its file, returns what takes the chunks. They are checked when
                the last has arrived: until `receive` returns, nothing may be done with them.

        Raises:
            WireError: The other side is gone, silent, or sends what is no message.
            InputError: The file is too large; the connection cannot be used further.
        """
        deadline = time.monotonic() + timeout_s
        head = self._read(_HEAD.size, deadline)
        magic, json_bytes, body_bytes = _HEAD.unpack(head)
        if magic != _MAGIC:
            raise WireError("it wants TLS" if head[:1] == _TLS_ALERT else "it speaks another protocol")
        if json_bytes > self._largest_json:
            raise WireError(f"a message of {json_bytes} bytes, where {self._largest_json} are allowed")
        text = self._read(json_bytes, deadline)
        message, code = _parse(text), self._code(1, self._received, head + text)
        self._received += 1
        if body_bytes:
            self._read_body(message, body_bytes, largest_body, open_body, code)
        if code is not None and not hmac.compare_digest(self._read(_TAG_BYTES, deadline + SILENCE_S), code.digest()):
            raise WireError("a message was changed on its way")
        return message

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read_body(
        self,
        message: dict[str, Any],
        size: int,
        largest: int,
        open_body: OpenBody | None,
        code: hmac.HMAC | None,
    ) -> None:
        if size > largest or open_body is None:
            raise InputError("the file is too large", expected=f"at most {largest} bytes", found=f"{size} bytes")
        take = open_body(message, size)
        while size:
            chunk = self._read(min(size, _CHUNK_BYTES), time.monotonic() + SILENCE_S)
            if code is not None:
                code.update(chunk)
            take(chunk)
            size -= len(chunk)

    def _read(self, size: int, deadline: float) -> bytes:
        parts: list[bytes] = []
        while size:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise WireError("nothing was heard in time")
            try:
                self._socket.settimeout(left_s)
                part = self._socket.recv(min(size, _CHUNK_BYTES))
            except TimeoutError as error:
                raise WireError("nothing was heard in time") from error
            except (OSError, ValueError) as error:
                raise WireError(str(error)) from error
            if not part:
                raise WireError("the connection was closed")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _code(self, direction: int, number: int, data: bytes) -> hmac.HMAC | None:
        if self._keys is None:
            return None
        return hmac.new(self._keys[direction], number.to_bytes(8, "big") + data, hashlib.sha256)


def greet_device(wire: Wire, secret: bytes | None, binding: bytes) -> None:
    """Begin a connection from the searching side.

    Args:
        wire: New connection.
        secret: Shared secret, None where the device has none.
        binding: What both sides know of the channel: the device's certificate, or nothing.

    Raises:
        InputError: One side has a secret and the other none or another, or the versions differ.
        WireError: The device is gone.
    """
    own = secrets.token_bytes(32)
    wire.send({"op": "begin", "version": VERSION, "nonce": own.hex()})
    answer = checked(wire.receive(HANDSHAKE_S))
    if answer.get("version") != VERSION:
        raise _misfit("the device speaks another version", f"version {VERSION}", f"version {answer.get('version')}")
    if (secret is not None) != (answer.get("secret") is True):
        have = ("a secret here and none on the device", "a secret on the device and none here")[secret is None]
        hint = "give both the same: --secret-file, or NAS_DEVICE_SECRET in the environment"
        raise _misfit("the shared secret is missing", "the same secret on both sides", have, hint)
    if secret is None:
        wire.send({"op": "prove"})
        checked(wire.receive(HANDSHAKE_S))
        wire.protect(None)
        return
    base = _base(secret, own, _nonce(answer), binding)
    wire.send({"op": "prove", "proof": _proof(base, b"client")})
    answer = checked(wire.receive(HANDSHAKE_S))
    if not hmac.compare_digest(str(answer.get("proof")), _proof(base, b"device")):
        raise _misfit("the device does not know the secret", "its proof", "another, or another certificate on the way")
    wire.protect((_key(base, b"to device"), _key(base, b"from device")))


def greet_searcher(wire: Wire, secret: bytes | None, binding: bytes) -> None:
    """Begin a connection from the device's side; see `greet_device`.

    Raises:
        InputError: The other side does not know the secret, or speaks another version.
        WireError: It is gone, or no searcher.
    """
    message, own = wire.receive(HANDSHAKE_S), secrets.token_bytes(32)
    if message.get("op") != "begin" or message.get("version") != VERSION:
        found = f"version {message.get('version')}"
        raise _misfit("the device speaks another version", f"version {VERSION}", found)
    theirs = _nonce(message)
    wire.send({"version": VERSION, "nonce": own.hex(), "secret": secret is not None})
    message = wire.receive(HANDSHAKE_S)
    if message.get("op") != "prove":
        raise WireError("no proof")
    if secret is None:
        wire.send({"ok": True})
        wire.protect(None)
        return
    base = _base(secret, theirs, own, binding)
    if not hmac.compare_digest(str(message.get("proof")).encode(), _proof(base, b"client").encode()):
        raise _misfit("the secret is wrong", "the device's", "another", "give the contents of the device's secret file")
    wire.send({"ok": True, "proof": _proof(base, b"device")})
    wire.protect((_key(base, b"from device"), _key(base, b"to device")))


def check_secret(secret: bytes, where: str) -> bytes:
    """Return a secret without the white space around it.

    Raises:
        InputError: It is too short to keep anybody out.
    """
    stripped = secret.strip()
    if len(stripped) < _SHORTEST_SECRET:
        raise InputError(
            "the secret is too short",
            where=where,
            expected=f"at least {_SHORTEST_SECRET} characters",
            found=str(len(stripped)),
            hint="make one with: python3 -c 'import secrets; print(secrets.token_hex(32))'",
        )
    return stripped


def binding_of(end: socket.socket, own_certificate: bytes | None = None) -> bytes:
    """Return the digest of the device's certificate, nothing on a plain connection.

    Args:
        end: Either end of a connection.
        own_certificate: DER bytes, on the device itself; the other side's are taken where None.
    """
    if not isinstance(end, ssl.SSLSocket):
        return b""
    return hashlib.sha256(own_certificate or end.getpeercert(binary_form=True) or b"").digest()


def describe_error(error: NasError) -> dict[str, Any]:
    """Return an error as a message."""
    texts = {name: getattr(error, name) for name in ("message", "where", "expected", "found", "hint")}
    cut = {name: text[:_TEXT_CHARACTERS] for name, text in texts.items() if text is not None}
    return {"error": {"kind": type(error).__name__, **cut}}


def checked(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message that is no error.

    Raises:
        NasError: It is one.
    """
    found = message.get("error")
    if found is None:
        return message
    if not isinstance(found, dict):
        raise WireError("an error without a description")
    kind = getattr(errors, str(found.get("kind")), NasError)
    kind = kind if isinstance(kind, type) and issubclass(kind, NasError) else NasError
    texts = {name: str(found[name]) for name in ("where", "expected", "found", "hint") if name in found}
    raise kind(str(found.get("message", "the device reports an error")), **texts)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a message that is no JSON: {type(error).__name__}") from error
    if not isinstance(message, dict):
        raise WireError("a message that is no object")
    return message


def _nonce(message: Mapping[str, Any]) -> bytes:
    try:
        nonce = bytes.fromhex(str(message.get("nonce")))
    except ValueError as error:
        raise WireError("a nonce that is no hexadecimal number") from error
    if len(nonce) != 32:
        raise WireError("a nonce of another length")
    return nonce


def _base(secret: bytes, searcher: bytes, device: bytes, binding: bytes) -> bytes:
    return hmac.digest(secret, b"nas device 1" + searcher + device + binding, "sha256")


def _key(base: bytes, purpose: bytes) -> bytes:
    return hmac.digest(base, b"key " + purpose, "sha256")


def _proof(base: bytes, side: bytes) -> str:
    return hmac.digest(base, b"proof " + side, "sha256").hex()


def _misfit(message: str, expected: str, found: str, hint: str | None = None) -> InputError:
    return InputError(message, expected=expected, found=found, hint=hint)
