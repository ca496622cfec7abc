"""`nas device serve`: offer this machine for measuring. It has a parser of its own: a device has numpy, no more."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import ssl
import stat
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from codegen import machine
from codegen.devices.server import Limits, Server
from codegen.devices.wire import check_secret
from ir.errors import InputError, NasError, TargetUnavailable

PORT: Final = 7431
SECRET_VARIABLE: Final = "NAS_DEVICE_SECRET"
SECRET_FILE_VARIABLE: Final = "NAS_DEVICE_SECRET_FILE"

_MIB: Final = 1 << 20
_DESCRIPTION: Final = """
Offer this machine for measuring: whoever connects sends artifacts, which are run here, and gets their latency. One
searcher at a time has the device. Give --device HOST:PORT to nas search, bench, remeasure, profile or compile there.

Artifacts are programs. Without a secret everybody who can connect can run anything here, so without one only this
machine can connect. Make one with: python3 -c 'import secrets; print(secrets.token_hex(32))' > secret; chmod 600 secret
"""


def main(arguments: Sequence[str] | None = None, program: str = "nas device serve") -> int:
    """Serve until interrupted.

    Args:
        arguments: Of the command line; those of the process where None.
        program: Its name, for messages.

    Returns:
        The exit code.
    """
    options = _parser(program).parse_args(arguments)
    try:
        server, line = _start(options)
    except NasError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.close).start())
    print(line, flush=True)
    server.run()
    return 0


def read_secret(path: str | None, environment: Mapping[str, str] = os.environ) -> bytes | None:
    """Return the shared secret from a file, or from the environment where none is named; None where there is none.

    Raises:
        InputError: The file cannot be read, others can read it, or the secret is too short.
    """
    path = path or environment.get(SECRET_FILE_VARIABLE) or None
    if path is None:
        given = environment.get(SECRET_VARIABLE) or None
        return None if given is None else check_secret(given.encode(), SECRET_VARIABLE)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise InputError(
                    "others can read the secret", where=path, expected="a file of yours alone", hint=f"chmod 600 {path}"
                )
            return check_secret(file.read(4096), path)
    except OSError as error:
        raise InputError("cannot read the secret", where=path, found=error.strerror) from error


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--host", default="127.0.0.1", help="address to listen on; beyond this machine only with a secret [%(default)s]"
    )
    add("--port", type=int, default=PORT, help="port to listen on, 0 for a free one [%(default)s]")
    add("--name", default=socket.gethostname(), help="what records call this device [%(default)s]")
    add("--secret-file", help=f"file with the shared secret; else {SECRET_FILE_VARIABLE}, else {SECRET_VARIABLE}")
    add("--tls-cert", help="certificate, PEM: connections are encrypted")
    add("--tls-key", help="its private key, PEM")
    add("--cache", type=Path, help="folder for artifacts [devices/PORT in the cache of nas]")
    add("--max-artifact-mib", type=int, default=1024, help="largest artifact [%(default)s]")
    add("--max-cache-mib", type=int, default=4096, help="all artifacts that are kept [%(default)s]")
    return parser


def _start(options: argparse.Namespace) -> tuple[Server, str]:
    """Return a server that listens, and the line that says where."""
    secret, tls = read_secret(options.secret_file), _tls(options.tls_cert, options.tls_key)
    limits = Limits(options.max_artifact_mib * _MIB, options.max_cache_mib * _MIB)
    if min(limits.artifact_bytes, limits.cache_bytes) <= 0:
        raise InputError("bad bound", where="--max-artifact-mib, --max-cache-mib", expected="at least 1")
    listener = _listen(options.host, options.port, secret is not None)
    host, port = listener.getsockname()[:2]
    folder = options.cache or machine.cache_directory() / "devices" / str(port)
    try:
        server = Server(listener, options.name, folder, secret=secret, tls=tls, limits=limits)
    except BaseException:
        listener.close()
        raise
    guards = f"{'secret' if secret else 'no secret'}, {'TLS' if tls else 'no TLS'}"
    return server, f"device {options.name} listens on {host}:{port} ({guards})"


def _listen(host: str, port: int, has_secret: bool) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise InputError("no such port", where="--port", expected="0 to 65535", found=str(port))
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not has_secret and not ipaddress.ip_address(address[0]).is_loopback:
            raise InputError(
                "without a secret only this machine may connect",
                where="--host",
                expected="127.0.0.1, or a secret besides",
                found=host,
                hint="give --secret-file, or leave --host out and let an SSH tunnel in",
            )
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise TargetUnavailable("cannot listen", where=f"{host}:{port}", found=str(error)) from error


def _tls(certificate: str | None, key: str | None) -> tuple[ssl.SSLContext, bytes] | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InputError(
            "TLS takes a certificate and its key", expected="--tls-cert and --tls-key", found="one of them"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
        text = Path(certificate).read_text(encoding="ascii")
        first = text[text.index("-----BEGIN CERTIFICATE") :].partition("-----END CERTIFICATE-----")
        return context, ssl.PEM_cert_to_DER_cert(first[0] + first[1])
    except (OSError, ValueError) as error:
        raise InputError("cannot use the certificate", where=certificate, found=str(error)) from error


if __name__ == "__main__":
    sys.exit(main(program="python -m codegen.devices.serve"))
