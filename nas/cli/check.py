"""`nas check`: whether components and published architectures are what their papers say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import InputError
from nas.cli.options import Json
from nas.cli.output import Output, make_table, output, tell

if TYPE_CHECKING:
    from nas.checks.zoo import Finding, ZooReport


def check(
    name: Annotated[
        str, typer.Argument(help="A published architecture such as zoo/swin, a component, or zoo with --all.")
    ],
    all_of_them: Annotated[bool, typer.Option("--all", help="Check every architecture of the zoo.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List the checks that passed too.")] = False,
    json: Json = False,
) -> None:
    """Check that an architecture is what was published and works from the graph to the compiled model.

    Its parts equal their equations in numpy, torch and compiled code, stream as they run at once, and keep their
    limits; parameters and multiply-adds are the published ones; a step of training lowers the loss.
    """
    from nas.checks.zoo import check_component, check_zoo, known_components, zoo_names

    with output(json) as out:
        if name == "zoo" and not all_of_them:
            raise InputError("which architecture?", where="zoo", expected="zoo/NAME, or --all", found="zoo")
        if name != "zoo" and name in known_components():
            _show_findings(name, check_component(name, progress=_progress(verbose)), verbose, out)
            return
        reports: list[ZooReport] = []
        for each in zoo_names() if name == "zoo" else (name,):
            reports.append(check_zoo(each, progress=_progress(verbose)))
            if name == "zoo":
                tell(_verdict(reports[-1]))
        _show_reports(reports, verbose, out)


def _progress(verbose: bool) -> Any:
    return (lambda text: tell(f"  {text}")) if verbose else None


def _verdict(report: ZooReport) -> str:
    failed = [finding for finding in report.findings if not finding.passed]
    state = "ok" if not failed else f"{len(failed)} of {len(report.findings)} failed"
    return f"{report.name}: {state}, {len(report.findings)} checks in {report.seconds:.0f} s"


def _show_reports(reports: list[ZooReport], verbose: bool, out: Output) -> None:
    passed = sum(report.passed for report in reports)
    if out.json:
        out.data({"passed": passed, "of": len(reports), "architectures": [report.to_dict() for report in reports]})
    else:
        for report in reports:
            _show_report(report, verbose, out)
        if len(reports) > 1:
            out.text(f"{passed} of {len(reports)} pass")
    if passed < len(reports):
        raise typer.Exit(1)


def _show_report(report: ZooReport, verbose: bool, out: Output) -> None:
    from nas.summary import format_count

    out.text(f"{_verdict(report)}; {format_count(report.params)} parameters, {format_count(report.macs)} multiply-adds")
    if report.published is not None and report.published.note:
        out.text(f"  note: {report.published.note}")
    shown = [finding for finding in report.findings if verbose or not finding.passed]
    if shown:
        out.table(_table(shown))


def _show_findings(name: str, findings: tuple[Finding, ...], verbose: bool, out: Output) -> None:
    failed = [finding for finding in findings if not finding.passed]
    if out.json:
        out.data({"name": name, "passed": not failed, "findings": [vars(finding) for finding in findings]})
    else:
        out.text(f"{name}: {len(findings) - len(failed)} of {len(findings)} checks pass")
        shown = findings if verbose else failed
        if shown:
            out.table(_table(list(shown)))
    if failed:
        raise typer.Exit(1)


def _table(findings: list[Finding]) -> Any:
    table = make_table("check", "subject", "passed", "figure", "note", right=("figure",))
    for finding in findings:
        figure = "" if finding.figure is None else f"{finding.figure:.3g}"
        table.add_row(finding.check, finding.subject, "yes" if finding.passed else "no", figure, finding.note)
    return table
