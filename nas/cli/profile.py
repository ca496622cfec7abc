"""`nas profile`: measure some models of a space on a device, for predicting the latency of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli import device as device_options
from nas.cli.options import Json, TargetName, Threads
from nas.cli.output import Output, make_table, output, program, tell

if TYPE_CHECKING:
    from pathlib import Path

    from ir.errors import NasError
    from nas.predictors.profile import Profile, Sample
    from searchspaces.architecture import Architecture

DEFAULT_SAMPLES = 40


def profile(
    space: Annotated[str, typer.Argument(help="A search space: a YAML file or a name.")],
    target: TargetName = "cpu",
    threads: Threads = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Models that the profile shall hold; what is there is not measured again.")
    ] = DEFAULT_SAMPLES,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in one call.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Decides which models are drawn.")] = 0,
    out: Annotated[
        str | None, typer.Option(help="Name in the cache, or path of a file; made up of space and target by default.")
    ] = None,
    energy: Annotated[
        bool, typer.Option("--energy", help="Measure energy too, by the processor's own counters (RAPL).")
    ] = False,
    device: device_options.Address = None,
    secret_file: device_options.SecretFile = None,
    tls_ca: device_options.TlsCa = None,
    tls_fingerprint: device_options.TlsFingerprint = None,
    device_wait: device_options.Wait = device_options.DEFAULT_WAIT_S,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    json: Json = False,
) -> None:
    """Measure models of a space on a device, so that `nas search --latency predicted:PROFILE` can do without it.

    The smallest, the middle and the largest first, then random ones; the file is written after each.
    """
    from nas.cli.models import task_of
    from nas.objectives.energy import Energy
    from nas.profile import profile as measure
    from searchspaces.space import load_space

    with output(json) as out_stream:
        loaded = load_space(space)
        found, path = measure(
            loaded,
            task=task_of(loaded),
            target=target,
            threads=threads,
            samples=samples,
            batch=batch,
            seed=seed,
            out=out,
            energy=Energy(batch=batch) if energy else None,
            listener=None if quiet else _Progress(),
            device=device_options.find_device(device, secret_file, tls_ca, tls_fingerprint, device_wait),
        )
        if len(found.samples) < samples:
            tell(f"no more than {len(found.samples)} different models could be measured")
        _show(found, path, space, out_stream)


class _Progress:
    """Tell on stderr how a profile comes about."""

    def on_sample(self, profile: Profile, sample: Sample, wanted: int) -> None:
        noisy = " noisy" if sample.noisy else ""
        tell(f"sample {len(profile.samples)}/{wanted}: {sample.latency_ms:.4g} ms{noisy}")

    def on_failure(self, architecture: Architecture, error: NasError) -> None:
        tell(f"not measured: {architecture.describe()}: {error.message}")


def _show(profile: Profile, path: Path, space: str, out: Output) -> None:
    """Print what the profile holds and how to use it; and as JSON."""
    from nas.predictors.profile import profile_folder

    given = profile.name if path.parent == profile_folder() else str(path)
    times = [sample.latency_ms for sample in profile.samples]
    joules = [sample.energy_j for sample in profile.samples if sample.energy_j is not None]
    noisy = sum(sample.noisy for sample in profile.samples)
    if out.json:
        out.data(
            {"name": given, "path": str(path), "fingerprint": profile.fingerprint, "space": profile.space["name"]}
            | {"samples": len(times), "noisy": noisy, "latency_ms": [min(times), max(times)]}
            | {"energy_j": [min(joules), max(joules)] if joules else None}
            | {"machine": profile.machine["cpu"], "threads": profile.threads, "batch": profile.batch}
        )
        return
    heads = ("profile", "space", "device", "samples", "noisy", "latency", "energy")
    table = make_table(*heads, right=("samples", "noisy"))
    spread = f"{min(times):.4g} to {max(times):.4g} ms"
    used = f"{min(joules):.4g} to {max(joules):.4g} J" if joules else "-"
    table.add_row(given, profile.space["name"], profile.fingerprint, str(len(times)), str(noisy), spread, used)
    out.table(table)
    out.text(f"  {path}", "", "Next:", f"  {program()} search {space} --latency predicted:{given}")
