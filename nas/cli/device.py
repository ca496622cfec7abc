"""`nas device`: offer this machine for measuring, and look at others that do. `--device` of the other verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from ir.errors import InputError, NasError
from nas.cli.options import Json
from nas.cli.output import make_table, output, program

if TYPE_CHECKING:
    from codegen.devices.client import Device

DEFAULT_WAIT_S = 300.0
_ONCE_S = 0.0

Address: TypeAlias = Annotated[
    str | None,
    typer.Option("--device", metavar="HOST:PORT", help="Measure on a device, which runs `nas device serve`."),
]
SecretFile: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--secret-file",
        envvar="NAS_DEVICE_SECRET_FILE",
        help="With --device: file with the shared secret; else NAS_DEVICE_SECRET.",
    ),
]
TlsCa: TypeAlias = Annotated[
    str | None,
    typer.Option("--tls-ca", envvar="NAS_DEVICE_TLS_CA", help="With --device: certificates to trust, PEM; uses TLS."),
]
TlsFingerprint: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--tls-fingerprint",
        envvar="NAS_DEVICE_TLS_FINGERPRINT",
        help="With --device: SHA-256 of the one certificate to trust; uses TLS.",
    ),
]
Wait: TypeAlias = Annotated[
    float,
    typer.Option(
        "--device-wait", min=0.0, help="With --device: seconds to wait for one that is away or that another one has."
    ),
]

app = typer.Typer(no_args_is_help=True, help="Offer this machine for measuring, or look at devices that do.")


def find_device(
    address: str | None, secret_file: str | None, tls_ca: str | None, tls_fingerprint: str | None, wait_s: float
) -> Device | None:
    """Return the device of the command line, None where there is none.

    Raises:
        InputError: Something of it is malformed.
    """
    if address is None:
        return None
    from codegen.devices.client import Device

    return Device.of(address, secret_file=secret_file, tls_ca=tls_ca, tls_fingerprint=tls_fingerprint, wait_s=wait_s)


@app.command(
    "serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def serve(context: typer.Context) -> None:
    """Offer this machine for measuring; its --help lists the options."""
    from codegen.devices.serve import main

    raise typer.Exit(main(context.args, f"{program()} device serve"))


@app.command("list")
def list_devices(
    device: Annotated[list[str], typer.Option("--device", metavar="HOST:PORT", help="A device; repeat it.")],
    secret_file: SecretFile = None,
    tls_ca: TlsCa = None,
    tls_fingerprint: TlsFingerprint = None,
    json: Json = False,
) -> None:
    """Show devices: machine, target, who has them. One that cannot be reached is said to be so."""
    with output(json) as out:
        facts: list[dict[str, Any]] = []
        for address in device:
            try:
                found = find_device(address, secret_file, tls_ca, tls_fingerprint, _ONCE_S)
                facts.append({"device": address} | _facts(found))
            except NasError as error:
                if isinstance(error, InputError) and len(device) == 1:
                    raise
                facts.append({"device": address, "error": f"{error.message}: {error.found}"})
        if out.json:
            out.data({"devices": facts})
            return
        table = make_table("device", "name", "machine", "CPUs", "target", "in use by", right=("CPUs",))
        for fact in facts:
            if "error" in fact:
                table.add_row(fact["device"], "-", fact["error"], "-", "-", "-")
                continue
            lease = fact["lease"]
            in_use = "nobody" if lease is None else f"{lease['holder']} since {lease['since']}"
            cpus = str(fact["machine"]["logical_cpus"])
            table.add_row(fact["device"], fact["name"], fact["machine"]["cpu"], cpus, fact["target"] or "-", in_use)
        out.table(table)


@app.command("status")
def status(
    device: Annotated[str, typer.Option("--device", metavar="HOST:PORT", help="The device.")],
    secret_file: SecretFile = None,
    tls_ca: TlsCa = None,
    tls_fingerprint: TlsFingerprint = None,
    json: Json = False,
) -> None:
    """Show all that a device says of itself."""
    with output(json) as out:
        facts = _facts(find_device(device, secret_file, tls_ca, tls_fingerprint, _ONCE_S))
        if out.json:
            out.data(facts)
            return
        out.text(*_describe(facts))


def _facts(device: Device | None) -> dict[str, Any]:
    from codegen.devices.targets import target_of

    assert device is not None  # both verbs demand an address
    report = device.report()
    facts: dict[str, Any] = {"name": report.name, "machine": dict(report.machine), "lease": report.lease}
    facts |= {"uploads": dict(report.uploads), "artifact_bytes": report.artifact_bytes}
    try:
        target = target_of(report)
    except NasError as error:
        return facts | {"target": None, "isa": None, "unavailable": str(error)}
    return facts | {"target": target.fingerprint, "isa": target.isa.name}


def _describe(facts: dict[str, Any]) -> list[str]:
    found, lease, uploads = facts["machine"], facts["lease"], facts["uploads"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    in_use = "by nobody"
    if lease is not None:
        left = "" if lease["connected"] else ", not connected at the moment"
        in_use = f"by {lease['holder']} since {lease['since']}{left}; {lease['waiting']} waiting"
    return [
        f"name       {facts['name']}",
        f"machine    {found['cpu']}, {found['architecture']}, {found['logical_cpus']} CPUs, {found['os']}",
        f"target     {facts['target'] or facts['unavailable']}",
        f"ISA        {facts['isa'] or '-'}",
        f"in use     {in_use}",
        f"artifacts  {uploads['files']}, {uploads['bytes'] / 2**20:.1f} of {uploads['largest_bytes'] / 2**20:.0f} MiB",
        f"versions   {versions}",
    ]
