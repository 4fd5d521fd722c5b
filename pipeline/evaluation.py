"""What logitcask evaluate finds, as a record. Losses and divergences are in nats a target position."""

from pydantic import BaseModel, ConfigDict, ValidationError

from cache.errors import LogitcaskError

EVALUATION_FILE = "evaluation.json"  # where logitcask compare looks for it in a run's folder


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Divergence(_Record):
    """KL(teacher || student) at one temperature."""

    temperature: float
    kl: float
    standard_error: float | None  # over examples; None of a single one


class Evaluation(_Record):
    """A student against the text and the teacher of a cache."""

    model: str
    cache: str
    examples: int
    positions: int
    perplexity: float
    hard_loss: float
    hard_loss_standard_error: float | None
    kl_estimate: str  # unbiased, exact, or lower bound
    kl: list[Divergence]
    top1_agreement: float | None  # None where the labels have no head
    calibration_error: float
    teacher_perplexity: float
    teacher_calibration_error: float | None


def parse_evaluation(text: str, where: str) -> Evaluation:
    """An evaluation from JSON. Raises LogitcaskError where it is none."""
    try:
        return Evaluation.model_validate_json(text)
    except ValidationError as error:
        raise LogitcaskError(
            f"{where}: not an evaluation ({error.errors()[0]['msg']}): make it again with logitcask evaluate"
        ) from error


def rows(found: Evaluation) -> dict[str, str]:
    """What to show of it, by name; what there is none of is left out."""
    shown = {
        "perplexity": f"{found.perplexity:,.3f}",
        "hard loss, nats": _with_error(found.hard_loss, found.hard_loss_standard_error),
        **{
            f"KL to the teacher at T={each.temperature:g}, nats, {found.kl_estimate}": _with_error(
                each.kl, each.standard_error
            )
            for each in found.kl
        },
        "top-1 agreement with the teacher": _percent(found.top1_agreement),
        "calibration error, 15 bins": _percent(found.calibration_error),
        "the teacher's perplexity": f"{found.teacher_perplexity:,.3f}",
        "the teacher's calibration error": _percent(found.teacher_calibration_error),
    }
    return {name: value for name, value in shown.items() if value is not None}


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.2%}"
