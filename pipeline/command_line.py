"""The command line, made from settings: their fields become options, and errors and help have one form."""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.pipeline.mistakes import did_you_mean, meant
from logitcask.pipeline.settings.base import (
    ARGUMENT,
    NUMBER,
    REPEATABLE,
    S,
    Settings,
    expand_home,
    flag_of,
    home_path,
    resolve,
)

CONFIG_HELP = "YAML file of these options, or the name of a file in configs/runs; a flag overrides it"
PARSER_ERROR: Any = typer.BadParameter.__mro__[2]  # the parser's base class: newer typer has a click of its own
TITLES = (  # of groups of options, in the order of help
    *("Required", "Data", "Teacher", "Label", "With --engine server", "Student", "Loss", "Optimizer", "Run"),
    *("Reporting", "Dry run", "Options"),
)
OPTIONAL_VALUES = {"--ray": "auto"}  # options that may be given without a value, and what they then mean


class _Once:
    """Refuses an option that is given twice, where click would keep the last value and drop the others."""

    def make_parser(self, ctx: Any) -> Any:
        """Return click's parser for this command, which then raises LogitcaskError at the second value."""
        parser: Any = super().make_parser(ctx)  # type: ignore[misc]
        earlier: dict[str, str] = {}

        def watch(option: Any, flag: str) -> None:
            process = option.process

            def process_once(value: Any, state: Any) -> None:
                now = f"{flag} {shown(value)}" if isinstance(value, str) else flag  # click marks a flag's absent value
                if option.dest in earlier:
                    raise LogitcaskError(f"{flag}: is given twice, {earlier[option.dest]} and {now}: give it once")
                earlier[option.dest] = now
                process(value, state)

            option.process = process_once

        for flag, option in parser._long_opt.items():
            if option.action.startswith("store") and option.dest != "help" and not ctx.resilient_parsing:
                watch(option, flag)
        return parser


class Command(_Once, TyperCommand):
    """A command whose ``OPTIONAL_VALUES`` may be given without a value, which typer does not support."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the missing values, then parse."""
        words = []
        for word, following in zip(args, [*args[1:], "-"], strict=False):
            bare = word in OPTIONAL_VALUES and following.startswith("-")
            words += [word, OPTIONAL_VALUES[word]] if bare else [word]
        return super().parse_args(ctx, words)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options in their groups, in the order in which they are declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            title = getattr(parameter, "rich_help_panel", None) or "Options"
            record = parameter.get_help_record(ctx)
            if record is not None and parameter.param_type_name == "argument":
                title, record = "Arguments", (str(parameter.metavar), record[1])  # newer typer adds a type of Python
            if record is not None:
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Group(_Once, TyperGroup):
    """A command with subcommands."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands with the first sentence of their help, where the parser would cut it."""
        rows = [(name, " ".join(str(command.help).split()).split(". ")[0]) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl([(name, text.removesuffix(".")) for name, text in rows])


def options_from(model: type[S]) -> Callable[[Callable[[S], None]], Callable[..., None]]:
    """Decorate ``f(settings)`` into a function whose signature is the model's fields plus ``--config``."""

    def decorate(function: Callable[[S], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            config = given.pop("config")
            flags = {name: value for name, value in given.items() if value not in (None, [], ())}
            function(resolve(model, config, flags))

        parameters = [
            _parameter(name, field, title)
            for title, names in grouped(model).items()
            for name, field in ((name, model.model_fields[name]) for name in names)
        ]
        parameters.append(
            inspect.Parameter(
                "config",
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[Path | None, typer.Option(parser=home_path, metavar="PATH", help=CONFIG_HELP)],
            )
        )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__doc__, command.__name__ = function.__doc__, function.__name__
        return command

    return decorate


def grouped(model: type[Settings]) -> dict[str, list[str]]:
    """Return the fields of a settings model by the title of their group, in the order of help: required ones first."""
    named = {name: (title, place) for title, names in model.groups.items() for place, name in enumerate(names.split())}
    found: dict[str, list[tuple[int, str]]] = {title: [] for title in TITLES}
    for name, field in model.model_fields.items():
        owner = next(base for base in model.__mro__ if name in inspect.get_annotations(base))
        title, place = named.get(name, (getattr(owner, "group", model.group), len(named)))
        found["Required" if field.is_required() else title].append((place, name))
    ordered = {title: sorted(names, key=lambda item: item[0]) for title, names in found.items() if names}
    return {title: [name for _, name in names] for title, names in ordered.items()}


def _parameter(name: str, field: FieldInfo, title: str) -> inspect.Parameter:
    """Return one option. All but switches are passed on as text, so that only the settings model judges values."""
    if ARGUMENT in field.metadata:
        argument = typer.Argument(metavar=name.upper(), help=field.description, show_default=False)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, argument])
    flag = flag_of(name)
    switch = field.annotation in (bool, bool | None)
    help_text = field.description or ""
    choices = choices_of(field.annotation)
    if choices:
        help_text += f" ({', '.join(choices)})"
    if field.is_required():
        help_text += " [required]"
    elif field.default not in (None, {}) and not switch:
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        help_text += f" [default: {default}]"
    option = (
        typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text, show_default=False, rich_help_panel=title)
        if switch
        else typer.Option(
            flag,
            help=help_text,
            show_default=False,
            rich_help_panel=title,
            metavar=f"[{_metavar(field)}]" if flag in OPTIONAL_VALUES else _metavar(field),
            autocompletion=(lambda: choices) if choices else None,
        )
    )
    kind: Any = bool if switch else list[str] if is_repeatable(field) else str
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def choices_of(annotation: Any) -> list[str]:
    """Return the texts that a type allows, if it lists them, also where it allows none at all."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return [choice for part in parts for choice in choices_of(part)]


def is_repeatable(field: FieldInfo) -> bool:
    """Return whether an option may be given several times."""
    return _is_marked(field, REPEATABLE)


def _is_marked(field: FieldInfo, mark: str) -> bool:
    return mark in field.metadata or repr(mark) in str(field.annotation)


def _metavar(field: FieldInfo) -> str:
    text = "TEXT" if is_repeatable(field) else "float" if _is_marked(field, NUMBER) else str(field.annotation)
    for word, metavar in (("Literal", "NAME"), ("Path", "PATH"), ("tuple", "LIST"), ("float", "NUMBER"), ("int", "N")):
        if word in text:
            return metavar
    return "TEXT"


def example(text: str) -> dict[str, Any]:
    """Return what every command is registered with: its class, and an example at the end of its help."""
    return {"cls": Command, "epilog": f"Example: logitcask {text}"}


def place(name: str, words: str) -> Any:
    """Return the argument that names a cache: a path, with ``~`` expanded, or a URL."""
    return typer.Argument(parser=expand_home, metavar=name, help=words)


def run_folders(words: str) -> Any:
    """Return the argument that names the folders of runs."""
    return typer.Argument(parser=home_path, metavar="RUNS", help=words)


def new_folder(words: str) -> Any:
    """Return the argument that names a folder to write to."""
    return typer.Argument(parser=home_path, metavar="FOLDER", help=words, show_default=False)


def file(words: str) -> Any:
    """Return an option that names a file."""
    return typer.Option(parser=home_path, metavar="PATH", help=words)


def parser_message(error: Any) -> str:
    """Return what is wrong with a command line, by the parser's error, in the form of our own messages."""
    kind, message = type(error).__name__, str(error.format_message()).rstrip(".")
    context: Any = getattr(error, "ctx", None)
    if kind == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    if kind == "NoSuchOption":
        options = [flag for parameter in context.command.params for flag in parameter.opts]
        if any(error.option_name in parameter.opts for parameter in context.find_root().command.params):
            words = f"logitcask {error.option_name} {context.info_name}"
            return f"{error.option_name} is of all commands: give it before the command: {words}"
        return f"no such option {plain(error.option_name)}{did_you_mean(meant(error.option_name, options))}"
    if kind == "MissingParameter":
        return f"{error.param.metavar or error.param.opts[0]} is missing: give it"
    if kind == "BadOptionUsage":
        return f"{error.option_name} has no value: give it one"
    if match := re.match("No such command '(.*?)'", message):
        names = difflib.get_close_matches(match[1], context.command.commands, 3)
        return f"no such command {plain(match[1])}{did_you_mean(names)}"
    return message[:1].lower() + message[1:]


def plain(word: str) -> str:
    """Return a typed word as it is, escaped if it has other than the characters of an option's name."""
    return word if re.fullmatch(r"[\w-]+", word) else shown(word)


def help_command(root: Any, words: Sequence[str]) -> str:
    """Return the command that a command line names, whose help says more about it."""
    path, command = ["logitcask"], root
    for word in (word for word in words if not word.startswith("-")):
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path.append(word)
    return " ".join(path)
