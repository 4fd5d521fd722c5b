"""A quantity that may change over a run: a number, or FIRST:LAST for a straight line over its steps."""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Discriminator, Field, PlainSerializer, Tag

from logitcask.pipeline.settings.base import NUMBER, Temperature

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Ramp(NamedTuple):
    """A straight line from the first optimizer step of a run to its last; steps count from 0."""

    first: float
    last: float

    @staticmethod
    def of(value: float | tuple[float, float]) -> "Ramp":
        """Return the line of a setting; that of a number is level."""
        return Ramp(*value) if isinstance(value, tuple) else Ramp(value, value)

    @property
    def level(self) -> bool:
        """Whether the value never changes."""
        return self.first == self.last

    def at(self, step: int, steps: int) -> float:
        """Return the value at a step of a run of ``steps``."""
        share = step / (steps - 1) if steps > 1 else 0.0
        return (1.0 - share) * self.first + share * self.last

    def nearest(self, step: int, steps: int, values: Sequence[float]) -> float:
        """Return that of ``values`` which is nearest to the line at a step; of two equally near, the one to come."""
        here = self.at(step, steps)
        return min(values, key=lambda value: (round(abs(value - here), 9), abs(value - self.last)))


def _ends(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    ends = value.split(":")
    if len(ends) != 2:
        raise ValueError("must be a number, or FIRST:LAST")
    return ends


def _kind(value: Any) -> str:
    return "line" if isinstance(value, tuple | list) or (isinstance(value, str) and ":" in value) else "number"


_LINE = (BeforeValidator(_ends), PlainSerializer(lambda ends: f"{ends[0]}:{ends[1]}"), Tag("line"))
Alpha = Annotated[
    Annotated[Fraction, Tag("number")] | Annotated[tuple[Fraction, Fraction], *_LINE], Discriminator(_kind), NUMBER
]
Temperatures = Annotated[
    Annotated[Temperature, Tag("number")] | Annotated[tuple[Temperature, Temperature], *_LINE],
    Discriminator(_kind),
    NUMBER,
]
