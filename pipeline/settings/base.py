"""Settings: each option is declared once, as a field with its type, limits, default and help text.

The command line is built from these models. A ``--config`` file sets the same names; a flag overrides it.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from logitcask.cache.errors import LogitcaskError

CONFIG_HELP = "YAML file of these options, or the name of a file in configs/runs; a flag overrides it"
OPTIONAL_VALUES = {"--ray": "auto"}  # options that may be given without a value, and what they then mean

Temperature = Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=1, le=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Settings(BaseModel):
    """A frozen, closed set of options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Settings)


def resolve(model: type[S], config: Path | None, flags: dict[str, Any]) -> S:
    """Return validated settings from a config file and flags.

    Raises LogitcaskError, naming the option, the rule and the value, if they are invalid.
    """
    given = {**(read_config(config_file("runs", config)) if config else {}), **flags}
    unknown = sorted(given.keys() - model.model_fields.keys())
    if unknown:
        raise LogitcaskError(f"{config}: unknown key {', '.join(unknown)}; known keys: {', '.join(model.model_fields)}")
    try:
        return model(**given)
    except ValidationError as error:
        raise LogitcaskError("; ".join(_explain(dict(item)) for item in error.errors())) from error


def _explain(item: dict[str, Any]) -> str:
    """Return one line about one broken rule: "--option: rule, got 'value'"."""
    option = flag_of(str(item["loc"][0])) if item["loc"] else ""
    if item["type"] == "missing":
        return f"{option} is required"
    message = str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "must be", 1)
    return f"{option}: {message}, got {item['input']!r}" if option else message


def flag_of(name: str) -> str:
    """Return a field's name as typed on the command line: ``--student-config`` for ``student_config``."""
    return "--" + name.rstrip("_").replace("_", "-")  # json_, since pydantic has a json of its own


def read_config(path: Path) -> dict[str, Any]:
    """Return names and values of a YAML config file. Raises LogitcaskError if it is not a readable mapping."""
    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise LogitcaskError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise LogitcaskError(f"{path}: not a readable YAML file: {reason}") from error
    if not isinstance(config, dict):
        raise LogitcaskError(f"{path}: must be a mapping of option names to values, got {type(config).__name__}")
    return {str(key): value for key, value in config.items()}


def config_file(kind: str, name: str | Path) -> Path:
    """Return the file that a user names: a path, or a file of ``configs/kind`` by its name without the suffix.

    Raises LogitcaskError, listing the known names, if it is neither.
    """
    path = Path(name)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    known = shipped_configs(kind)
    if path.name not in known:
        raise LogitcaskError(f"{name}: neither a file nor a known name: known are {', '.join(sorted(known))}")
    return known[path.name]


def shipped_configs(kind: str) -> dict[str, Path]:
    """Return the files of ``configs/kind`` that come with the package, by name without the suffix."""
    return {file.stem: file for file in (Path(__file__).parents[2] / "configs" / kind).iterdir()}


def shard_range(text: str) -> tuple[int, int]:
    """Return FIRST and STOP of ``FIRST:STOP``. Raises LogitcaskError if the text has another form."""
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if not match:
        raise LogitcaskError(f"--shards: must be FIRST:STOP, such as 0:10, got {text!r}")
    return int(match[1]), int(match[2])


class Command(TyperCommand):
    """A command whose ``OPTIONAL_VALUES`` may be given without a value, which typer does not support."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the missing values, then parse."""
        words = []
        for word, following in zip(args, [*args[1:], "-"], strict=False):
            bare = word in OPTIONAL_VALUES and following.startswith("-")
            words += [word, OPTIONAL_VALUES[word]] if bare else [word]
        return super().parse_args(ctx, words)


def options_from(model: type[S]) -> Callable[[Callable[[S], None]], Callable[..., None]]:
    """Decorate ``f(settings)`` into a function whose signature is the model's fields plus ``--config``."""

    def decorate(function: Callable[[S], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            config = given.pop("config")
            flags = {name: value for name, value in given.items() if value is not None}
            function(resolve(model, config, flags))

        parameters = [_parameter(name, field) for name, field in model.model_fields.items()]
        parameters.append(
            inspect.Parameter(
                "config",
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[Path | None, typer.Option(help=CONFIG_HELP)],
            )
        )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__doc__, command.__name__ = function.__doc__, function.__name__
        return command

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return one option. All but switches are passed on as text, so that only the settings model judges values."""
    flag = flag_of(name)
    switch = field.annotation is bool
    help_text = field.description or ""
    choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
    if choices:
        help_text += f" ({', '.join(choices)})"
    if field.is_required():
        help_text += " [required]"
    elif field.default is not None and not switch:
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        help_text += f" [default: {default}]"
    option = (
        typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text, show_default=False)
        if switch
        else typer.Option(
            flag,
            help=help_text,
            show_default=False,
            metavar=f"[{_metavar(field)}]" if flag in OPTIONAL_VALUES else _metavar(field),
            autocompletion=(lambda: choices) if choices else None,
        )
    )
    kind: Any = bool if switch else str
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _metavar(field: FieldInfo) -> str:
    text = str(field.annotation)
    for word, metavar in (("Literal", "NAME"), ("Path", "PATH"), ("tuple", "LIST"), ("float", "NUMBER"), ("int", "N")):
        if word in text:
            return metavar
    return "TEXT"
