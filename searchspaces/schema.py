"""The shape of a search-space file: which keys there are and what each may hold.

Components and their options are not known here (`domains.py` checks them against the registry); this module only says
that a mixer is a name or a name with options. Every violation becomes one `SpaceError` with its place in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from ir.errors import InputError, did_you_mean
from ir.ops.structure import OptionValue
from searchspaces.signature import Condition, Modality, Output, Signature
from searchspaces.violations import first_error, shown, violation
from searchspaces.yaml_source import MAX_MAGNITUDE, Source, is_list, is_mapping

SCHEMA_VERSION = 1
MAX_RANGE_POINTS = 10**6
MAX_WIDTH = 65_536
MAX_DEPTH = 256
MAX_SEQ_LEN = 2**20
SHAPES = "shapes"  # the task of a space that gives a signature alone
_TURNS = re.compile(r"(?P<name>\w+) x (?P<times>[1-9]\d{0,2})")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _know_every_key(cls, data: Any) -> Any:
        if not is_mapping(data):
            return data
        allowed = cls._known_keys()
        for key in data:
            if key not in allowed:
                raise violation(
                    f"unknown key `{key}`",
                    expected=f"one of {', '.join(allowed)}",
                    found=f"`{key}`",
                    hint=did_you_mean(str(key), allowed) or "remove it",
                    key=str(key),
                )
        return data

    @classmethod
    def _known_keys(cls) -> tuple[str, ...]:
        return tuple(field.alias or name for name, field in cls.model_fields.items())


T = TypeVar("T")


def _form(value: Any) -> str:
    """Tell the three ways to write a value apart: fixed, a choice, a range."""
    if not is_mapping(value):
        return "value"
    return "range" if "range" in value and "choice" not in value else "choice"


class _Domain(_Section):
    @classmethod
    def _known_keys(cls) -> tuple[str, ...]:
        return ("choice", "range")


class ChoiceOf(_Domain, Generic[T]):
    """`{choice: [a, b, c]}`."""

    choice: Annotated[list[T], Field(min_length=1)]

    @field_validator("choice")
    @classmethod
    def _list_each_once(cls, values: list[T]) -> list[T]:
        seen: set[tuple[type, T]] = set()
        for value in values:
            if (type(value), value) in seen:
                raise violation(
                    "the choice lists a value twice",
                    expected="each value once",
                    found=shown(value),
                    hint="remove the repetition: it would be drawn twice as often",
                )
            seen.add((type(value), value))
        return values


class RangeOf(_Domain, Generic[T]):
    """`{range: [low, high, step]}`, `high` included when a step lands on it."""

    range: Annotated[list[T], Field(min_length=3, max_length=3)]

    @field_validator("range", mode="before")
    @classmethod
    def _end_and_fit(cls, bounds: Any) -> Any:
        if not is_list(bounds) or not all(_is_number(bound) for bound in bounds):
            raise violation(
                "a range is three numbers",
                expected="[low, high, step]",
                found=shown(bounds),
                hint="for words write {choice: [...]}",
            )
        if len(bounds) == 3:
            _check_range(*bounds)
        return bounds


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_MAGNITUDE


def _check_range(low: float, high: float, step: float) -> None:
    found = f"[{low}, {high}, {step}]"
    if low > high:
        raise violation(
            "the range is empty",
            expected="low <= high",
            found=found,
            hint=f"did you mean [{high}, {low}, {abs(step)}]?",
        )
    if step <= 0:
        raise violation(
            "the range never ends", expected="a step above 0", found=found, hint=f"did you mean [{low}, {high}, 1]?"
        )
    if (high - low) / step + 1 > MAX_RANGE_POINTS:
        raise violation(
            "the range has too many points",
            expected=f"at most {MAX_RANGE_POINTS} points",
            found=found,
            hint="take a larger step, or a choice of powers of two",
        )


def written(domain: Any) -> tuple[Literal["value", "choice", "range"], Sequence[OptionValue]]:
    """Return how a domain is written, and the values that it lists or spans."""
    if isinstance(domain, RangeOf):
        return "range", _points(cast("list[int | float]", domain.range))  # pyright: ignore[reportUnknownMemberType]
    if isinstance(domain, ChoiceOf):
        return "choice", cast("list[OptionValue]", domain.choice)  # pyright: ignore[reportUnknownMemberType]
    return "value", (domain,)


def _points(bounds: list[int | float]) -> Sequence[int | float]:
    """Return the points of `[low, high, step]`: integers where all three are, otherwise floats."""
    low, high, step = bounds
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int):
        return range(low, high + 1, step)
    count = math.floor((high - low) / step + 1e-9) + 1
    return tuple(round(low + index * step, 12) for index in range(count))


def _scalar(value: Any) -> OptionValue:
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise violation(
            "an option is a single value",
            expected="a number, a word, true, false, {choice: [...]} or {range: [low, high, step]}",
            found=shown(value),
            hint="to try several values write {choice: [...]}",
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise violation(
            "not a finite number", expected="a finite number", found=shown(value), hint="leave the option out"
        )
    return value


Width: TypeAlias = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Depth: TypeAlias = Annotated[int, Field(ge=0, le=MAX_DEPTH)]
Scalar: TypeAlias = Annotated[Any, AfterValidator(_scalar)]

WidthDomain: TypeAlias = Annotated[
    Annotated[Width, Tag("value")]
    | Annotated[ChoiceOf[Width], Tag("choice")]
    | Annotated[RangeOf[Width], Tag("range")],
    Discriminator(_form),
]
DepthDomain: TypeAlias = Annotated[
    Annotated[Depth, Tag("value")]
    | Annotated[ChoiceOf[Depth], Tag("choice")]
    | Annotated[RangeOf[Depth], Tag("range")],
    Discriminator(_form),
]
OptionDomain: TypeAlias = Annotated[
    Annotated[Scalar, Tag("value")]
    | Annotated[ChoiceOf[Scalar], Tag("choice")]
    | Annotated[RangeOf[int | float], Tag("range")],
    Discriminator(_form),
]


def _as_entry(value: Any) -> Any:
    """Rewrite `mamba` as `{mamba: {}}`."""
    if isinstance(value, str):
        return {value: {}}
    if not is_mapping(value) or len(value) != 1:
        raise violation(
            "each entry names one component",
            expected="`name` or `name: {option: value}`",
            found=shown(value),
            hint="begin each component with its own `- `" if is_mapping(value) else "write the component's name",
        )
    key, options = next(iter(value.items()))
    if key in ("choice", "range"):
        raise violation(
            "a choice of components cannot hold another one",
            expected="`name` or `name: {option: value}`",
            found=shown(value),
            hint="list all components in one `choice:`",
        )
    return {key: {} if options is None else options}


def _as_slot(value: Any) -> Any:
    """Rewrite a single component as a choice of one."""
    if isinstance(value, str):
        return {"choice": [value]}
    if is_mapping(value) and ("choice" in value or "per_layer" in value or "pattern" in value):
        return value
    if is_mapping(value) and len(value) == 1 and "range" not in value:
        return {"choice": [value]}
    raise violation(
        "components are chosen by name",
        expected="`name`, `name: {option: value}` or `{choice: [name, ...]}`",
        found=shown(value),
        hint="to offer several components list them under `choice:`",
    )


Entry: TypeAlias = Annotated[dict[str, dict[str, OptionDomain]], BeforeValidator(_as_entry)]


class SlotSection(_Section):
    """A place in the model that a component fills."""

    choice: Annotated[list[Entry], Field(min_length=1)]


Slot: TypeAlias = Annotated[SlotSection, BeforeValidator(_as_slot)]


def _as_turn(value: Any) -> Any:
    """Rewrite `gla x 3` and `{gla x 3: {...}}` as a slot that comes three times in a row."""
    name = value if isinstance(value, str) else next(iter(value)) if is_mapping(value) and len(value) == 1 else ""
    found = _TURNS.fullmatch(name)
    if found is None:
        return {"slot": value}
    options: Any = value[name] if is_mapping(value) else {}
    return {"slot": {found["name"]: options}, "times": int(found["times"])}


class TurnSection(_Section):
    """One turn of a pattern."""

    slot: Slot
    times: Annotated[int, Field(ge=1, le=MAX_DEPTH)] = 1


class LayerSlotSection(_Section):
    """A place in every block; `per_layer` lets each layer draw its own, `pattern` lets the layers take turns."""

    choice: Annotated[list[Entry], Field(min_length=1)] | None = None
    per_layer: bool = False
    pattern: Annotated[list[Annotated[TurnSection, BeforeValidator(_as_turn)]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _name_components_once(self) -> LayerSlotSection:
        if (self.choice is None) == (self.pattern is None):
            raise violation(
                "a place in the block takes a choice of components or a pattern of them",
                expected="`choice: [...]` or `pattern: [...]`",
                found="neither" if self.choice is None else "both",
                hint="remove one of them" if self.choice else "add `choice: [...]`",
            )
        if self.pattern is not None and self.per_layer:
            raise violation(
                "a pattern already says what each layer is",
                expected="`pattern` without `per_layer`",
                found="both",
                hint="remove `per_layer`",
            )
        return self


LayerSlot: TypeAlias = Annotated[LayerSlotSection, BeforeValidator(_as_slot)]


def _only(name: str) -> dict[str, list[dict[str, dict[str, Any]]]]:
    return {"choice": [{name: {}}]}


class ConditionSection(_Section):
    """Side inputs, as in `searchspaces.signature.Condition`."""

    timestep: bool = False
    num_labels: Annotated[int, Field(ge=1)] = 0


class SignatureSection(_Section):
    """Inputs and outputs of models that no task comes with; sizes as in `searchspaces.signature.Signature`."""

    modality: Modality
    output: Output
    seq_len: Annotated[int, Field(ge=1, le=MAX_SEQ_LEN)] = 0
    vocab_size: Annotated[int, Field(ge=1)] = 0
    image_size: Annotated[int, Field(ge=1)] = 0
    channels: Annotated[int, Field(ge=1)] = 0
    variates: Annotated[int, Field(ge=1)] = 0
    num_classes: Annotated[int, Field(ge=1)] = 0
    horizon: Annotated[int, Field(ge=1)] = 0
    out_channels: Annotated[int, Field(ge=1)] = 0
    condition: ConditionSection | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> SignatureSection:
        try:
            self.signature()
        except InputError as error:
            raise violation(
                error.message,
                expected=error.expected or "sizes that go together",
                found=error.found or "others",
                hint=f"see {error.where}" if error.where else "see docs/spaces.md",
            ) from error
        return self

    def signature(self) -> Signature:
        """The signature itself."""
        condition = Condition(**self.condition.model_dump()) if self.condition else None
        return Signature(**self.model_dump(exclude={"condition"}), condition=condition)


class CommonModelSection(_Section):
    """What holds for the whole model, however many stages it has."""

    task: Annotated[str, Field(min_length=1)]
    signature: SignatureSection | None = None
    data: str | None = None
    seq_len: Annotated[int, Field(ge=1, le=MAX_SEQ_LEN)] | None = None
    position: Slot = SlotSection.model_validate(_only("none"))
    norm: Slot = SlotSection.model_validate(_only("rms_norm"))
    final_norm: Slot | None = None
    causal: bool | None = None
    stem: Slot | None = None
    head: Slot | None = None
    conditioner: Slot | None = None
    macro: Slot | None = None

    @model_validator(mode="before")
    @classmethod
    def _take_a_task_or_a_signature(cls, data: Any) -> Any:
        if not is_mapping(data) or "signature" not in data:
            return data
        if "task" in data:
            raise violation(
                "task and signature together",
                expected="`task`, which has a signature, or `signature` alone",
                found="both",
                hint="remove one of them",
                key="signature",
            )
        return {**data, "task": SHAPES}


class ModelSection(CommonModelSection):
    """What holds for the whole model of equal layers."""

    d_model: WidthDomain
    depth: DepthDomain


class BlockSection(_Section):
    """What each layer is made of."""

    wiring: LayerSlot = LayerSlotSection.model_validate(_only("pre_norm"))
    token_mixer: LayerSlot
    channel_mixer: LayerSlot
    reducer: LayerSlot = LayerSlotSection.model_validate(_only("none"))


class StageBlockSection(_Section):
    """What the layers of a stage are made of where that differs from the other stages."""

    wiring: LayerSlot | None = None
    token_mixer: LayerSlot | None = None
    channel_mixer: LayerSlot | None = None
    reducer: LayerSlot | None = None


class StageSection(_Section):
    """One stage of a pyramid."""

    transition: Slot | None = None
    d_model: WidthDomain
    depth: DepthDomain
    block: StageBlockSection = StageBlockSection()


class PublishedSection(_Section):
    """What a paper or its code says of the one architecture that a space holds.

    `macs` are multiply-adds of matrix products, convolutions and attention, which most papers print as FLOPs.
    `deviation` says by which share of a printed number the architecture differs from it, and `note` why.
    """

    paper: str
    url: str
    params: Annotated[int, Field(ge=1)] | None = None
    macs: Annotated[float, Field(gt=0)] | None = None
    source: str
    note: str = ""
    deviation: dict[Literal["params", "macs"], float] = {}

    @model_validator(mode="after")
    def _explain_deviations(self) -> PublishedSection:
        if self.deviation and not self.note:
            raise violation(
                "a deviation without a reason",
                expected="`note`, which says why the model is not what is printed",
                found="none",
                hint="add a note, or remove the deviation",
                key="deviation",
            )
        return self


class Bound(_Section):
    """Limits of a measured or counted quantity."""

    min: Annotated[float, Field(ge=0)] | None = None
    max: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _leave_room(self) -> Bound:
        if self.min is None and self.max is None:
            raise violation(
                "the constraint has no limit", expected="min, max or both", found="neither", hint="write {max: ...}"
            )
        if self.min is not None and self.max is not None and self.min > self.max:
            raise violation(
                "nothing satisfies this constraint",
                expected="min <= max",
                found=f"min {self.min:,.12g}, max {self.max:,.12g}",
                hint="did you swap min and max?",
            )
        return self


class ConstraintsSection(_Section):
    """What an architecture must satisfy to be tried."""

    METRICS: ClassVar[tuple[str, ...]] = ("params", "flops", "state_bytes", "latency_ms")

    params: Bound | None = None
    flops: Bound | None = None
    state_bytes: Bound | None = None
    latency_ms: Bound | None = None
    at_least_one_of: Annotated[list[str], Field(min_length=1)] | None = None
    order: Annotated[list[Annotated[list[str], Field(min_length=1)]], Field(min_length=2, max_length=8)] | None = None


class TrainingSection(_Section):
    """Defaults that a run's own settings override."""

    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None


class CommonFile(_Section):
    """What every search-space file has."""

    schema_version: int = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$", max_length=64)]
    description: str = ""
    published: PublishedSection | None = None
    constraints: ConstraintsSection = ConstraintsSection()
    training: TrainingSection = TrainingSection()

    @model_validator(mode="before")
    @classmethod
    def _read_this_version(cls, data: Any) -> Any:
        version = data.get("schema", SCHEMA_VERSION) if is_mapping(data) else SCHEMA_VERSION
        if type(version) is not int or version != SCHEMA_VERSION:
            raise violation(
                "unknown schema version",
                expected=f"`schema: {SCHEMA_VERSION}`",
                found=f"`schema: {shown(version).strip('`')}`",
                hint=f"this release reads version {SCHEMA_VERSION}; a newer file needs a newer release",
                key="schema",
            )
        return data


class SpaceFile(CommonFile):
    """A search-space file whose models are equal layers."""

    model: ModelSection
    block: BlockSection


class PyramidFile(CommonFile):
    """A search-space file whose models are stages; `block` is what the stages leave open."""

    model: CommonModelSection
    block: StageBlockSection = StageBlockSection()
    stages: Annotated[list[StageSection], Field(min_length=1)]


def parse_space(source: Source) -> SpaceFile | PyramidFile:
    """Check a source against the schema.

    Raises:
        SpaceError: The first violation in the file.
    """
    file = PyramidFile if is_mapping(source.data) and "stages" in source.data else SpaceFile
    try:
        return file.model_validate(source.data)
    except ValidationError as error:
        raise first_error(error, source) from None
