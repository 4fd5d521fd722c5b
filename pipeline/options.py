"""Command-line options made from a settings model, so that each knob is declared once."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from logitcask.pipeline.config import resolve
from logitcask.pipeline.settings import S

ALONE = {"--ray": "auto"}  # options that may stand without a value, and what they mean then


class Command(TyperCommand):
    """A command whose options of ``ALONE`` may stand without a value: typer knows no such options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give them their values, then parse."""
        found = []
        for word, following in zip(args, [*args[1:], "-"], strict=False):
            found += [word, ALONE[word]] if word in ALONE and following.startswith("-") else [word]
        return super().parse_args(ctx, found)


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
                annotation=Annotated[Path | None, typer.Option(help="YAML file of these options; a flag overrides it")],
            )
        )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__doc__, command.__name__ = function.__doc__, function.__name__
        return command

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """One option. Everything but a switch is passed on as text: the settings model is the only judge of values."""
    flag = "--" + name.rstrip("_").replace("_", "-")  # json_, since pydantic has a json of its own
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
            metavar=f"[{_metavar(field)}]" if flag in ALONE else _metavar(field),
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
