"""Tasks of lm-evaluation-harness, through its Python API. Needs the extra ``lm-eval``."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.runs.evaluation import TaskMetric


class Tasks:
    """Tasks that the harness knows by name, or that YAML files define."""

    def __init__(self, names: Sequence[str]) -> None:
        """Look the tasks up. Raises LogitcaskError if the harness is not installed or a task or file does not exist."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise LogitcaskError("--tasks needs the package lm-eval: pip install 'logitcask[lm-eval]'") from error
        files = [name for name in names if name.endswith((".yaml", ".yml"))]
        missing = [name for name in files if not Path(name).is_file()]
        if missing:
            raise LogitcaskError(f"--tasks {', '.join(missing)}: no such file: give the YAML file of a task")
        self._names = list(names)
        self._manager = TaskManager(
            include_defaults=len(files) < len(names)
        )  # reading the 14,000 defaults takes seconds
        unknown = sorted(set(names) - set(files) - set(self._manager.all_tasks))
        if unknown:
            raise LogitcaskError(
                f"--tasks: no task {', '.join(unknown)} in lm-evaluation-harness: lm-eval ls tasks lists them; "
                "the file that defines your own task must end in .yaml"
            )

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int | None, batch_size: int
    ) -> list[TaskMetric]:
        """Return the tasks' metrics on their first ``limit`` examples. Raises LogitcaskError if a task cannot run."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about what we intend
        try:
            evaluated = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=self._names,
                task_manager=self._manager,
                limit=limit,
                log_samples=False,
            )
        except Exception as error:  # the harness, its tasks and their data raise anything
            raise LogitcaskError(
                f"--tasks {','.join(self._names)}: lm-evaluation-harness cannot run it: {type(error).__name__}: {error}"
            ) from error
        return [metric for task, values in evaluated["results"].items() for metric in _metrics(task, values)]


def _metrics(task: str, values: dict[str, Any]) -> list[TaskMetric]:
    """Read a task's metrics: keys are ``metric,filter``, those of standard errors ``metric_stderr,filter``."""
    metrics = []
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        metrics.append(
            TaskMetric(
                task=task,
                metric=metric if chosen == "none" else f"{metric} ({chosen})",
                value=value,
                standard_error=error if isinstance(error, float) else None,
                examples=values["sample_len"],
            )
        )
    return metrics
