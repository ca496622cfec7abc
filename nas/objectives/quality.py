"""What the model scores on the task once trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nas.objectives.base import Context, Direction, Objective
from nas.trial import CHECKPOINT_FILE, Quantity, Source

if TYPE_CHECKING:
    from nas.tasks.base import Task
    from nas.training.budget import Budget, TrainOptions

WEIGHTS_FILE = "weights.safetensors"
_DEFAULT_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Quality(Objective):
    """Train the model from scratch on the task and score it on the validation split.

    Unit and direction come from the task. Exactly one of steps, tokens and seconds ends the training; with none of them
    it takes 200 steps. Quality repeats from run to run unless seconds decide.

    A strategy that stops trials early looks at it after parts of the budget; a training in parts gives what it gives in
    one go.

    Attributes:
        steps: Updates.
        tokens: Input positions read.
        seconds: Time spent in updates.
        options: Optimiser settings; None takes the defaults of the task's modality.
        min: Smallest value allowed.
        max: Largest value allowed.
    """

    name: str = "quality"
    source: Source = "trained"
    staged: bool = True
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    options: TrainOptions | None = field(default=None)
    min: float | None = None
    max: float | None = None

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return self.min, self.max

    @property
    def settings(self) -> dict[str, Any]:
        given = {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return settings | ({} if self.options is None else {"options": asdict(self.options)})

    @property
    def budget(self) -> Budget:
        """How long to train."""
        from nas.training.budget import Budget

        if self.steps is None and self.tokens is None and self.seconds is None:
            return Budget(steps=_DEFAULT_STEPS)
        return Budget(steps=self.steps, tokens=self.tokens, seconds=self.seconds)

    def bind(self, task: Task | None) -> Quality:
        if task is None:
            return self
        _ = self.budget  # a bad budget is an error now, not in the first trial
        unit: str = task.metric.unit
        direction: Direction = task.direction
        return replace(self, unit=unit, direction=direction)

    def evaluate(self, context: Context) -> Quantity:
        from safetensors.numpy import save

        from nas.train import train

        def show(step: int, total: int, loss: float) -> None:
            context.report(f"training {step}/{total}, loss {loss:.3f}")

        result = train(
            context.architecture,
            context.require_task(self.name),
            self.budget,
            seed=context.seed,
            trial=context.number,
            options=self.options,
            threads=context.threads,
            progress=show,
            until=context.until,
            resume=context.checkpoint,
        )
        if result.checkpoint is None:
            context.files[WEIGHTS_FILE] = save(result.params)
        else:
            context.files[CHECKPOINT_FILE] = result.checkpoint
        partial: dict[str, Any] = {} if context.until >= 1 else {"fraction": context.until}
        return self.quantity(
            result.quality,
            metric=context.require_task(self.name).metric.name,
            loss=result.loss,
            steps=result.steps,
            seconds=round(result.seconds, 3),
            **partial,
        )
