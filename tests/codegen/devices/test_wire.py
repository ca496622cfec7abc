"""Messages between a device and a searcher: what arrives is what was sent, or nothing arrives."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from codegen.devices import wire
from codegen.devices.wire import Wire, WireError, check_secret, checked, describe_error, greet_device, greet_searcher
from ir.errors import InputError, KernelCrash, NasError

SECRET = b"0123456789abcdef"
KEYS = (b"a" * 32, b"b" * 32)


@pytest.fixture
def pair() -> Iterator[tuple[Wire, Wire]]:
    one, other = socket.socketpair()
    yield Wire(one), Wire(other)
    one.close()
    other.close()


def greeted(device_secret: bytes | None, own: bytes | None, bindings: tuple[bytes, bytes] = (b"", b"")) -> list[str]:
    """Greet from both sides, then exchange a message; give what each side raised."""
    one, other = socket.socketpair()
    errors = ["", ""]

    def device() -> None:
        end = Wire(one)
        try:
            greet_searcher(end, device_secret, bindings[0])
            end.send({"got": end.receive(60.0)})
        except NasError as error:
            errors[0] = error.message
            end.send(describe_error(error))
        except WireError as error:
            errors[0] = str(error)

    thread = threading.Thread(target=device)
    thread.start()
    end = Wire(other)
    try:
        greet_device(end, own, bindings[1])
        end.send({"hello": 1})
        assert end.receive(60.0) == {"got": {"hello": 1}}
    except (NasError, WireError) as error:
        errors[1] = str(error)
    other.close()
    thread.join(60.0)
    one.close()
    return errors


@pytest.mark.parametrize("secret", [None, SECRET], ids=["open", "secret"])
def test_both_sides_greet_with_the_same_secret(secret):
    """Or with none on both sides."""
    assert greeted(secret, secret) == ["", ""]


def test_another_secret_is_refused_by_the_device():
    """Who does not know it hears nothing but that."""
    device, searcher = greeted(SECRET, b"another secret of the same kind")
    assert device == "the secret is wrong"
    assert "the secret is wrong" in searcher


@pytest.mark.parametrize("secrets", [(SECRET, None), (None, SECRET)], ids=["device", "searcher"])
def test_a_secret_on_one_side_alone_is_refused(secrets):
    """A searcher with a secret does not trust a device without, which may be anybody."""
    assert "the shared secret is missing" in greeted(*secrets)[1]


def test_proofs_hold_for_one_certificate():
    """Somebody in between, with a certificate of their own, cannot hand the proofs on."""
    assert greeted(SECRET, SECRET, (b"theirs", b"another"))[0] == "the secret is wrong"


def test_a_device_that_does_not_know_the_secret_is_refused():
    """The device proves itself too, so a message made up by somebody else is not believed."""
    one, other = socket.socketpair()

    def impostor() -> None:
        end = Wire(one)
        end.receive(60.0)
        end.send({"version": wire.VERSION, "nonce": "00" * 32, "secret": True})
        end.receive(60.0)
        end.send({"ok": True, "proof": "00" * 32})

    thread = threading.Thread(target=impostor)
    thread.start()
    with pytest.raises(InputError, match="does not know the secret"):
        greet_device(Wire(other), SECRET, b"")
    thread.join(60.0)
    one.close()
    other.close()


def sent(message: dict, body: bytes = b"", keys: tuple[bytes, bytes] | None = KEYS, times: int = 1) -> bytes:
    """Give the bytes of messages."""
    one, other = socket.socketpair()
    parts: list[bytes] = []
    reader = threading.Thread(target=lambda: parts.extend(iter(lambda: other.recv(1 << 16), b"")))
    reader.start()
    end = Wire(one)
    if keys is not None:
        end.protect(keys)
    for _ in range(times):
        end.send(message, [body], len(body))
    end.close()
    reader.join(60.0)
    other.close()
    return b"".join(parts)


def receive_from(data: bytes, keys: tuple[bytes, bytes] | None, count: int = 1) -> list[tuple[dict, bytes]]:
    one, other = socket.socketpair()
    feeder = threading.Thread(target=lambda: (one.sendall(data), one.shutdown(socket.SHUT_WR)))
    feeder.start()
    end = Wire(other)
    if keys is not None:
        end.protect((keys[1], keys[0]))
    found = []
    try:
        for _ in range(count):
            chunks: list[bytes] = []
            message = end.receive(60.0, largest_body=1 << 20, open_body=lambda _m, _s, chunks=chunks: chunks.append)
            found.append((message, b"".join(chunks)))
    finally:
        other.close()
        feeder.join(60.0)
        one.close()
    return found


def test_files_arrive_as_they_were_sent():
    """With and without codes."""
    body = np.random.default_rng(0).bytes(200_000)
    for keys in (None, KEYS):
        assert receive_from(sent({"op": "file"}, body, keys), keys) == [({"op": "file"}, body)]


@pytest.mark.parametrize("place", range(0, 150, 7))
def test_any_changed_bit_is_noticed(place):
    """In the head, the text, the file or the code itself."""
    data = bytearray(sent({"op": "file", "sha256": "0" * 40}, b"x" * 40))
    data[place % len(data)] ^= 1 << place % 8
    with pytest.raises((WireError, InputError)):
        receive_from(bytes(data), KEYS)


def test_a_message_that_is_repeated_is_noticed():
    """So nobody who listened can ask again."""
    once = sent({"op": "keep"})
    assert receive_from(sent({"op": "keep"}, times=2), KEYS, 2)[1][0] == {"op": "keep"}
    with pytest.raises(WireError, match="changed"):
        receive_from(once + once, KEYS, 2)


def test_messages_do_not_pass_for_the_other_direction():
    """A device's answer sent back to it is no request."""
    one, other = socket.socketpair()
    end = Wire(one)
    end.protect(KEYS)
    end.send({"op": "keep"})
    other.sendall(other.recv(1 << 16))
    with pytest.raises(WireError, match="changed"):
        end.receive(60.0)
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "another protocol"),
        (b"\x15\x03\x01\x00\x02\x02\x0a" + b"\0" * 20, "TLS"),
        (struct.pack("!4sIQ", b"NAS1", 1 << 31, 0), "bytes"),
        (struct.pack("!4sIQ", b"NAS1", 5, 0) + b"hello", "JSON"),
        (struct.pack("!4sIQ", b"NAS1", 4, 0) + b"[{}]", "object"),
        (struct.pack("!4sIQ", b"NAS1", 4000, 0) + b"[" * 4000, "JSON"),
        (struct.pack("!4sIQ", b"NAS1", 3, 0) + b"\xff\xfe\xfd", "JSON"),
        (struct.pack("!4sIQ", b"NAS1", 10, 0) + b"{}", "closed"),
        (b"NAS", "closed"),
        (b"", "closed"),
    ],
    ids=["http", "tls", "long", "text", "list", "deep", "bytes", "short", "magic", "nothing"],
)
def test_what_is_no_message_ends_the_connection(data, reason):
    """With a reason, and before anything large is kept."""
    with pytest.raises(WireError, match=reason):
        receive_from(data, None)


def test_a_file_larger_than_allowed_is_refused_unread(pair):
    """However large it says it is."""
    near, far = pair
    near._socket.sendall(struct.pack("!4sIQ", b"NAS1", 2, 1 << 60) + b"{}")
    with pytest.raises(InputError, match="too large"):
        far.receive(60.0, largest_body=10, open_body=lambda _message, _size: len)


def test_silence_counts_as_gone(pair):
    """A connection that says nothing does not hold anybody up."""
    with pytest.raises(WireError, match="in time"):
        pair[0].receive(0.01)


def test_errors_cross_with_their_class_and_words():
    """And nothing but errors of this project is made of what the other side says."""
    error = KernelCrash("measure ended its process", where="x", found="signal SIGSEGV", hint="look")
    with pytest.raises(KernelCrash) as raised:
        checked(describe_error(error))
    assert (raised.value.message, raised.value.where, raised.value.found, raised.value.hint) == (
        "measure ended its process",
        "x",
        "signal SIGSEGV",
        "look",
    )
    for kind in ("SystemExit", "Iterable", "difflib", "__name__", "", None, 5):
        with pytest.raises(NasError):
            checked({"error": {"kind": kind, "message": "made up"}})
    with pytest.raises(WireError):
        checked({"error": "text"})


def test_a_short_secret_is_refused():
    """A proof that was listened to would let it be guessed."""
    assert check_secret(SECRET + b"\n", "file") == SECRET
    with pytest.raises(InputError, match="too short"):
        check_secret(b"password\n\n\n\n\n\n\n\n\n\n", "file")
