"""What logitcask evaluate finds, as a record. Losses and divergences are in nats a target position."""

from pydantic import BaseModel, ConfigDict, ValidationError

from logitcask.cache.errors import LogitcaskError

EVALUATION_FILE = "evaluation.json"  # where logitcask compare looks for it in a run's folder


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Divergence(_Record):
    """KL(teacher || student) at one temperature."""

    temperature: float
    kl: float
    standard_error: float | None  # over examples; None of a single one


class OnCache(_Record):
    """A student against the text and the teacher of a cache."""

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


class PassRate(_Record):
    """pass@k: the chance that at least one of k samples solves a problem, averaged over problems."""

    k: int
    rate: float
    standard_error: float | None  # over problems; None of a single one


class HumanEval(_Record):
    """How much of the code that a model writes does what HumanEval's tests ask."""

    problems: int
    samples: int  # a problem
    temperature: float
    prompting: str  # completion, or chat
    pass_rates: list[PassRate]
    stopped: int  # programs that ended without a result, mostly by a limit of the sandbox
    without_room: int  # problems whose prompt leaves the model no position to write at
    isolation: str  # namespaces, or interpreter


class TaskMetric(_Record):
    """One metric of a task of lm-evaluation-harness."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    examples: int


class Evaluation(_Record):
    """What was found of a model; None or empty is what was not asked for."""

    model: str
    on_cache: OnCache | None
    humaneval: HumanEval | None
    tasks: list[TaskMetric]


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
    shown = (_cache_rows(found.on_cache) if found.on_cache else {}) | (
        _humaneval_rows(found.humaneval) if found.humaneval else {}
    )
    for each in found.tasks:
        value = _with_error(each.value, each.standard_error)
        shown[f"{each.task}, {each.metric}, {each.examples:,} examples"] = value
    return {name: value for name, value in shown.items() if value is not None}


def _cache_rows(found: OnCache) -> dict[str, str | None]:
    return {
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


def _humaneval_rows(found: HumanEval) -> dict[str, str | None]:
    asked = f"{found.problems} problems, {found.samples} samples at T={found.temperature:g}, {found.prompting}"
    return {
        **{
            f"HumanEval pass@{each.k}, {asked}": _with_error(each.rate, each.standard_error)
            for each in found.pass_rates
        },
        "HumanEval programs stopped by the sandbox": f"{found.stopped:,}" if found.stopped else None,
        "HumanEval prompts too long for the model": f"{found.without_room:,}" if found.without_room else None,
    }


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.2%}"
