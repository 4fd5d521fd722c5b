"""The record that `logitcask evaluate` writes. Losses and divergences are in nats per target position."""

from pydantic import BaseModel, ConfigDict, ValidationError

from logitcask.cache.errors import LogitcaskError

EVALUATION_FILE = "evaluation.json"  # the name that logitcask compare looks for in a run's folder


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Divergence(_Record):
    """KL(teacher || student) at one temperature."""

    temperature: float
    kl: float
    standard_error: float | None  # over examples; None for a single example


class Group(_Record):
    """A student on the examples of a cache with one value of a column."""

    column: str
    value: str | None  # None: the examples without one
    examples: int
    positions: int
    perplexity: float
    kl: list[Divergence]


class OnCache(_Record):
    """A student against the text and the teacher of a cache."""

    cache: str
    examples: int
    positions: int
    perplexity: float
    hard_loss: float
    hard_loss_standard_error: float | None
    kl_estimate: str  # unbiased, exact, exact labels, or lower bound
    kl: list[Divergence]
    top1_agreement: float | None  # None if the labels have no head
    calibration_error: float
    teacher_perplexity: float | None  # None if the labels do not say how probable the text was
    teacher_calibration_error: float | None
    groups: list[Group] = []  # by column and value, if the cache has such columns


class PassRate(_Record):
    """pass@k: the chance that at least one of k samples solves a problem, averaged over problems."""

    k: int
    rate: float
    standard_error: float | None  # over problems; None for a single problem


class HumanEval(_Record):
    """How much of a model's code passes HumanEval's tests."""

    problems: int
    samples: int  # per problem
    temperature: float
    prompting: str  # completion or chat
    pass_rates: list[PassRate]
    stopped: int  # programs that ended without a result, mostly at a limit of the sandbox
    without_room: int  # problems whose prompt fills the model's context
    isolation: str  # namespaces or interpreter


class TaskMetric(_Record):
    """One metric of one task of lm-evaluation-harness."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    examples: int


class Evaluation(_Record):
    """The evaluation of a model; what was not requested is None or empty."""

    model: str
    on_cache: OnCache | None
    humaneval: HumanEval | None
    tasks: list[TaskMetric]


def parse_evaluation(text: str, where: str) -> Evaluation:
    """Parse an evaluation from JSON. Raises LogitcaskError if the text is not one."""
    try:
        return Evaluation.model_validate_json(text)
    except ValidationError as error:
        raise LogitcaskError(
            f"{where}: not an evaluation ({error.errors()[0]['msg']}): write it anew with logitcask evaluate"
        ) from error


def rows(evaluation: Evaluation) -> dict[str, str]:
    """Return the figures to show, by name, without those that are None."""
    figures = (_cache_rows(evaluation.on_cache) if evaluation.on_cache else {}) | (
        _humaneval_rows(evaluation.humaneval) if evaluation.humaneval else {}
    )
    for task in evaluation.tasks:
        value = _with_error(task.value, task.standard_error)
        figures[f"{task.task}, {task.metric}, {task.examples:,} examples"] = value
    return {name: value for name, value in figures.items() if value is not None}


def _cache_rows(on_cache: OnCache) -> dict[str, str | None]:
    return {
        "perplexity": f"{on_cache.perplexity:,.3f}",
        "hard loss, nats": _with_error(on_cache.hard_loss, on_cache.hard_loss_standard_error),
        **{
            f"KL to the teacher at T={divergence.temperature:g}, nats, {on_cache.kl_estimate}": _with_error(
                divergence.kl, divergence.standard_error
            )
            for divergence in on_cache.kl
        },
        "top-1 agreement with the teacher": _percent(on_cache.top1_agreement),
        "calibration error, 15 bins": _percent(on_cache.calibration_error),
        "the teacher's perplexity": _number(on_cache.teacher_perplexity),
        "the teacher's calibration error": _percent(on_cache.teacher_calibration_error),
        **{
            f"{group.column} {group.value or '(none)'}": f"{group.examples:,} examples, {group.positions:,} positions, "
            f"perplexity {group.perplexity:,.3f}, KL at T={kl.temperature:g} {_with_error(kl.kl, kl.standard_error)}"
            for group in on_cache.groups
            for kl in group.kl[:1]
        },
    }


def _humaneval_rows(humaneval: HumanEval) -> dict[str, str | None]:
    sampling = f"{humaneval.samples} samples at T={humaneval.temperature:g}"
    setup = f"{humaneval.problems} problems, {sampling}, {humaneval.prompting}"
    return {
        **{
            f"HumanEval pass@{rate.k}, {setup}": _with_error(rate.rate, rate.standard_error)
            for rate in humaneval.pass_rates
        },
        "HumanEval programs stopped by the sandbox": f"{humaneval.stopped:,}" if humaneval.stopped else None,
        "HumanEval prompts too long for the model": f"{humaneval.without_room:,}" if humaneval.without_room else None,
    }


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:,.3f}"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.2%}"
