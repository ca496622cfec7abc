"""Whether a published architecture of the zoo is what was published, and works from the graph to the compiled model.

report = check_zoo("zoo/swin")
print(report.passed, [finding.check for finding in report.findings if not finding.passed])
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ir.component import TokenMixer
from ir.cost import profile
from ir.errors import InputError, NasError
from ir.graph import Graph
from ir.initializers import Params, draw, initialize
from ir.ops.structure import NUMPY_DTYPES, Parameter
from nas.checks.component import CHECKS, CheckFailed, graph_round_trips, limit_holds
from nas.checks.subjects import Subject, own_subjects, subjects
from searchspaces.architecture import Architecture
from searchspaces.registry import components
from searchspaces.signature import Signature
from searchspaces.space import ZOO, Published, load_space, shipped_spaces

if TYPE_CHECKING:
    from codegen.artifact import Artifact

CHECKED_KINDS: Final = (
    "token_mixer",
    "channel_mixer",
    "norm",
    "reducer",
    "transition",
    "stem",
    "conditioner",
    "head",
    "block",
)
"""Kinds of components that can be checked alone."""
PUBLISHED_ERROR: Final = 0.01
"""Relative difference from published numbers that rounding in print explains."""
NARROW: Final = frozenset({"growth", "step_at_every_length"})
"""Checks that take the declared cases instead: growth shows there at few tokens, and many streams are quick."""
COSTLIEST: Final = 10
"""Kernels, by estimated time, of which none may be generic."""
FLOPS_A_BYTE: Final = 4.0
"""Operations that take as long as moving a byte: of a CPU with 120 GFLOP/s and 30 GB/s a core."""
TRAINING_BATCH: Final = 2
TRAINING_TOKENS: Final = 64
LONGEST_TIME: Final = 1000.0
"""Timesteps of the diffusion models in print."""
NUMBERS: Final = frozenset({"forecast", "denoise"})
"""Outputs that are numbers to come near to; all others are scores of classes."""
TRAINING_RATES: Final = (1e-3, 1e-4, 1e-5)
"""Step sizes of which one has to lower the loss: a step down the gradient does if it is short enough."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: Name of the check.
        subject: What was checked: `model`, or a part of it.
        passed: Whether it holds.
        figure: What was measured, where there is a number.
        note: Why it failed, or what there is to say.
    """

    check: str
    subject: str
    passed: bool
    figure: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ZooReport:
    """All findings about one architecture.

    Attributes:
        name: Name of the space.
        params: Trained parameters.
        macs: Multiply-adds of one forward pass at batch 1.
        published: What is printed about it.
        seconds: Time that the checks took.
        findings: In the order of the checks.
    """

    name: str
    params: int
    macs: int
    published: Published | None
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(finding.passed for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "passed": self.passed}


def zoo_names() -> tuple[str, ...]:
    """Names of all published architectures, such as `zoo/swin`."""
    return tuple(name for name in shipped_spaces() if name.startswith(f"{ZOO}/"))


def check_zoo(name: str, progress: Callable[[str], None] | None = None) -> ZooReport:
    """Check one published architecture.

    Args:
        name: Name of its space, such as `zoo/swin`.
        progress: Called with the name of each check before it runs.

    Raises:
        InputError: There is no such space, or it holds more than one architecture.
    """
    space = load_space(name)
    if space.size() != 1 or space.signature is None:
        raise InputError(
            "only a published architecture can be checked",
            where=name,
            expected="a space of one architecture with a signature",
            found=f"{space.size():,} architectures",
            hint=f"one of {', '.join(zoo_names())}",
        )
    start = time.perf_counter()
    architecture, signature = space.smallest(), space.signature
    graph = architecture.graph(signature)
    cost = profile(graph)
    findings: list[Finding] = []
    for check, subject, run in _checks(architecture, signature, graph, space.published):
        if progress:
            progress(f"{check}: {subject}")
        findings.append(_finding(check, subject, run))
    seconds = time.perf_counter() - start
    return ZooReport(name, cost.params, cost.macs, space.published, seconds, tuple(findings))


def check_names(architecture: Architecture, signature: Signature) -> list[str]:
    """Names of the different checks that an architecture is subject to."""
    found = own_subjects(architecture, signature)
    names = [name for name, _, _ in (*_subject_checks(found), *_limit_checks(found))]
    published = ["published_params", "published_macs", "round_trip"]
    return list(dict.fromkeys([*published, *names, "compiled_equals_torch", "fast_kernels", "trains"]))


def check_component(key: str, progress: Callable[[str], None] | None = None) -> tuple[Finding, ...]:
    """Check every declared case and limit of the components of a key.

    Raises:
        InputError: No component has this key.
    """
    findings: list[Finding] = []
    found = [subject for kind in CHECKED_KINDS for subject in subjects(kind) if subject.component.key() == key]
    if not found:
        raise InputError("nothing of this name can be checked", where=key, hint="`nas list components` shows them")
    for check, subject, run in [*_subject_checks(found), *_limit_checks(found)]:
        if progress:
            progress(f"{check}: {subject}")
        findings.append(_finding(check, subject, run))
    return tuple(findings)


def _finding(check: str, subject: str, run: Callable[[], float | None]) -> Finding:
    try:
        return Finding(check, subject, True, run())
    except NasError as error:
        details = ", ".join(text for text in (error.where, error.found) if text)
        return Finding(check, subject, False, note=f"{error.message}: {details}" if details else error.message)


_Run = tuple[str, str, Callable[[], float | None]]


def _checks(
    architecture: Architecture, signature: Signature, graph: Graph, published: Published | None
) -> Iterator[_Run]:
    """Give every check of an architecture: its name, its subject, and what runs it."""
    cost = profile(graph)
    if published is not None:
        yield "published_params", "model", lambda: _near(cost.params, published.params, "params", published)
        yield "published_macs", "model", lambda: _near(cost.macs, published.macs, "macs", published)
    yield "round_trip", "model", lambda: graph_round_trips(graph)
    found = own_subjects(architecture, signature)
    yield from _subject_checks(found, but=NARROW)
    yield from _subject_checks(_declared(found), only=NARROW)
    yield from _limit_checks(found)
    compiled = lru_cache(maxsize=1)(lambda: _compile(graph))
    yield "compiled_equals_torch", "model", lambda: compiled().verification_error
    yield "fast_kernels", "model", lambda: _uses_fast_kernels(compiled().kernels)
    yield "trains", "model", lambda: _lowers_the_loss(architecture, signature)


def _declared(found: list[Subject]) -> list[Subject]:
    """The declared cases of the token mixers among some subjects."""
    keys = {subject.component.key() for subject in found if isinstance(subject.component, TokenMixer)}
    return [subject for subject in subjects("token_mixer") if subject.component.key() in keys]


def _subject_checks(
    found: list[Subject], *, only: Set[str] | None = None, but: Set[str] = frozenset()
) -> Iterator[_Run]:
    for subject in found:
        for check in CHECKS:
            wanted = check.name not in but and (only is None or check.name in only)
            if wanted and check.applies(subject):
                yield check.name, subject.name, lambda check=check, subject=subject: check.run(subject)


def _limit_checks(found: list[Subject]) -> Iterator[_Run]:
    classes = dict.fromkeys(type(subject.component) for subject in found)
    for component in classes:
        for limit in component.limits:
            yield (
                "limit",
                f"{component.key()}: {limit.says}",
                lambda component=component, limit=limit: limit_holds(component, limit),
            )


def _near(found: float, expected: float | None, name: str, published: Published) -> float | None:
    """Return the relative difference from a published number; more than rounding must be the deviation declared."""
    if expected is None:
        if not published.note:
            raise CheckFailed("no number is given and no note says why", where="published")
        return None
    difference = found / expected - 1.0
    if abs(difference - published.deviation.get(name, 0.0)) > PUBLISHED_ERROR:
        raise CheckFailed("not the published number", expected=f"{expected:,.6g}", found=f"{found:,.6g}")
    return difference


def _compile(graph: Graph) -> Artifact:
    from codegen import targets
    from codegen.compile import compile_graph

    return compile_graph(graph, _opened(graph), targets.get("cpu"))


def _opened(graph: Graph) -> Params:
    """Initial values, but drawn for matrices that start at 0: behind a gate that is shut nothing could be compared."""
    params = initialize(graph, 0)
    for name, node in graph.parameters.items():
        if isinstance(node.op, Parameter) and node.op.init == "constant(0)" and len(node.op.axes) > 1:
            params[name] = draw(replace(node.op, init="fan_in"), 0)
    return params


def _uses_fast_kernels(kernels: Sequence[Mapping[str, Any]]) -> None:
    costliest = sorted(kernels, key=lambda kernel: -max(kernel["flops"], FLOPS_A_BYTE * kernel["bytes"]))[:COSTLIEST]
    generic = [kernel["kernel"] for kernel in costliest if kernel["generic"]]
    if generic:
        raise CheckFailed("generic code is among the costliest kernels", found=", ".join(generic))


def _lowers_the_loss(architecture: Architecture, signature: Signature) -> float:
    """One step down the gradient lowers the loss on the same batch, all gradients finite; returns the change."""
    import torch

    from codegen.torch_backend import to_module

    if signature.modality == "tokens":
        signature = replace(signature, seq_len=min(signature.seq_len, TRAINING_TOKENS))
    graph = architecture.graph(signature, batch=TRAINING_BATCH)
    inputs, targets = _batch(signature)
    module = to_module(graph, _opened(graph))
    weights = [weight for weight in module.parameters() if weight.requires_grad]

    def loss() -> torch.Tensor:
        output = module(**inputs)[signature.output_name]
        if signature.output in NUMBERS:
            return (output - targets).square().mean()
        return torch.nn.functional.cross_entropy(output.flatten(0, -2), targets.flatten())

    before = loss()
    before.backward()
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not gradients or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        raise CheckFailed("a gradient is not finite, or there is none")
    length = float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())
    done, change = 0.0, 0.0
    for rate in TRAINING_RATES:
        with torch.no_grad():
            for weight in weights:
                if weight.grad is not None:
                    weight -= weight.grad * ((rate - done) / max(length, 1e-12))
            done = rate
            change = float(loss() - before)
        if change < 0:
            return change
    raise CheckFailed("no step down the gradient lowers the loss", found=f"{change:+.3g} at {done:g}")


def _batch(signature: Signature) -> tuple[dict[str, Any], Any]:
    """A random batch of a signature: inputs by name and targets."""
    import torch

    rng = np.random.default_rng(0)
    shape = signature.input_shape(TRAINING_BATCH)
    if signature.input_dtype == "int32":
        given = rng.integers(0, signature.vocab_size, shape).astype(np.int32)
    else:
        given = rng.standard_normal(shape).astype(np.float32)
    wanted = signature.output_shape(TRAINING_BATCH)
    if signature.output in NUMBERS:
        targets = torch.from_numpy(rng.standard_normal(wanted).astype(np.float32))
    else:
        targets = torch.from_numpy(rng.integers(0, wanted[-1], wanted[:-1]))
    inputs = {signature.input_name: torch.from_numpy(given)}
    return inputs | _side_inputs(signature, rng), targets


def _side_inputs(signature: Signature, rng: np.random.Generator) -> dict[str, Any]:
    """Random values of the inputs that a condition adds."""
    import torch

    condition = signature.condition
    inputs: dict[str, Any] = {}
    for name, kind in condition.inputs(TRAINING_BATCH).items() if condition else ():
        labels = condition.num_labels if condition and name == "label" else 0
        given = rng.integers(0, labels, kind.shape) if labels else rng.uniform(0.0, LONGEST_TIME, kind.shape)
        inputs[name] = torch.from_numpy(given.astype(NUMPY_DTYPES[kind.dtype]))
    return inputs


def known_components() -> tuple[str, ...]:
    """Keys of all components that can be checked alone."""
    return tuple(sorted({key for kind in CHECKED_KINDS for key in components(kind)}))
