"""`nas keygen` and `nas sign`: who an artifact comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import Json
from nas.cli.output import output, program


def keygen(
    name: Annotated[Path, typer.Argument(help="Writes NAME.key, to be kept secret, and NAME.pub, to be given away.")],
    json: Json = False,
) -> None:
    """Make a pair of keys to sign artifacts with, and to check signatures."""
    from codegen.signing import make_keys

    private, public = (name.with_name(f"{name.name}.{suffix}") for suffix in ("key", "pub"))
    with output(json) as out:
        make_keys(private, public)
        if out.json:
            out.data({"private_key": str(private), "public_key": str(public)})
            return
        out.text(
            f"{private}: the private key; whoever has it can sign in your name",
            f"{public}: the public key, for those who load your artifacts",
            "Next:",
            f"  {program()} sign MODEL.nas --key {private}",
        )


def sign(
    artifact: Annotated[Path, typer.Argument(help="A .nas file; it is signed in place.")],
    key: Annotated[Path, typer.Option("--key", help="File with the private key, as `nas keygen` writes it.")],
    json: Json = False,
) -> None:
    """Sign an artifact, so that others can tell that it comes from you and is as you made it."""
    from codegen.signing import sign as sign_file

    with output(json) as out:
        public = sign_file(artifact, key)
        if out.json:
            out.data({"artifact": str(artifact), "public_key": public})
            return
        out.text(f"{artifact} is signed; its public key is {public}")
