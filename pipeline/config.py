"""Settings from a YAML config file and the flags that override it."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.settings import S


def read_config(path: Path) -> dict[str, Any]:
    """Names and values of a YAML config file. Raises LogitcaskError where it is no mapping."""
    try:
        found = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise LogitcaskError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise LogitcaskError(f"{path}: not a readable YAML file: {reason}") from error
    if not isinstance(found, dict):
        raise LogitcaskError(f"{path}: a config must be a mapping of option names to values, is {type(found).__name__}")
    return {str(key): value for key, value in found.items()}


def resolve(model: type[S], config: Path | None, flags: dict[str, Any]) -> S:
    """Validated settings from a config file and flags. Raises LogitcaskError naming the option, rule and value."""
    given = {**(read_config(config) if config else {}), **flags}
    unknown = sorted(given.keys() - model.model_fields.keys())
    if unknown:
        raise LogitcaskError(f"{config}: unknown key {', '.join(unknown)}: known are {', '.join(model.model_fields)}")
    try:
        return model(**given)
    except ValidationError as error:
        raise LogitcaskError("; ".join(_explain(dict(item)) for item in error.errors())) from error


def _explain(item: dict[str, Any]) -> str:
    """One line for one broken rule."""
    option = "--" + str(item["loc"][0]).replace("_", "-") if item["loc"] else ""
    if item["type"] == "missing":
        return f"{option} is required"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{option}: {message}, is {item['input']!r}" if option else message
