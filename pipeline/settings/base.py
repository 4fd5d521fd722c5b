"""Settings: each option is declared once, as a field with its type, limits, default and help text.

The command line is built from these models. A ``--config`` file sets the same names; a flag overrides it.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from logitcask.cache.errors import LogitcaskError, shown
from logitcask.cache.storage.url import is_url
from logitcask.pipeline.mistakes import did_you_mean, meant

Temperature = Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=1, le=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
REPEATABLE = "repeatable"  # marks a field whose option may be given several times
WEIGHT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
NUMBER = "number"  # marks a field of numbers whose type does not say so
ARGUMENT = "argument"  # marks a field that is given without an option's name


def expand_home(value: Any) -> Any:
    """Return a path or its text with a leading ``~`` replaced by the home folder, any other value as it is.

    Raises LogitcaskError if there is no such home folder, or the text is empty, which would be the current folder.
    """
    if value == "":
        raise LogitcaskError("a path is empty: write . for the current folder")
    if not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    try:
        return type(value)(Path(value).expanduser())
    except RuntimeError as error:
        raise LogitcaskError(
            f"{value}: ~ is the home folder, which is unknown here: set HOME, or write the whole path (./~ for a name "
            "that starts with ~)"
        ) from error


def path_or_url(value: Any) -> Any:
    """Return a URL as text, else a path with a name: the files beside a cache are named after its folder."""
    if not isinstance(value, str | Path) or is_url(value):
        return value
    path = Path(expand_home(value))
    return path if path.name not in ("", "..") else path.resolve()


def is_plain_url(value: str) -> bool:
    """Return whether a text is an http:// or https:// URL of a host and a path, without user, password or query."""
    try:
        parts = urlsplit(value)
        has_host = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return has_host and "@" not in parts.netloc and not parts.query and not parts.fragment


def home_path(text: str) -> Path:
    """Return the path that a word of the command line names, ``~`` expanded."""
    return Path(expand_home(text))


def split_weight(text: str) -> tuple[str, float | None]:
    """Return the place and the weight of ``PLACE:WEIGHT``; no weight if none follows, or all of it is a path."""
    place, _, weight = text.rpartition(":")
    if not place or not WEIGHT.fullmatch(weight) or os.path.exists(text):
        return text, None
    return place, float(weight)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _one_or_all(sources: tuple[str, ...]) -> str | list[str]:
    """Return a single source as it was stored before there could be several."""
    return sources[0] if len(sources) == 1 else list(sources)


FilePath = Annotated[Path, BeforeValidator(expand_home)]
Place = Annotated[str, BeforeValidator(expand_home)]  # a path, a URL or a hub id
CachePlace = Annotated[Path | str, BeforeValidator(path_or_url)]
Sources = Annotated[
    tuple[Annotated[Place, Field(min_length=1)], ...],
    BeforeValidator(_as_tuple),
    PlainSerializer(_one_or_all),
    Field(min_length=1),
    REPEATABLE,
]


class Settings(BaseModel):
    """A frozen, closed set of options.

    In help they stand in groups: those that ``groups`` names, first in the order given, then those of a class with its
    ``group``.
    """

    group: ClassVar[str] = "Options"
    groups: ClassVar[Mapping[str, str]] = {}  # names of fields, blanks between, by title

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Settings)


def resolve(model: type[S], config: Path | None, flags: dict[str, Any]) -> S:
    """Return validated settings from a config file and flags.

    Raises LogitcaskError, naming the option, the rule and the value, if they are invalid.
    """
    given = {**(read_config(config_file("runs", config)) if config else {}), **flags}
    for name, value in given.items():
        require_plain_text(flag_of(name), value)
    for name in sorted(given.keys() - model.model_fields.keys()):
        close = [flag[2:].replace("-", "_") for flag in meant(flag_of(name), list(map(flag_of, model.model_fields)))]
        known = did_you_mean(close) or f"; known keys: {', '.join(model.model_fields)}"
        raise LogitcaskError(f"{config}: unknown key {name}{known}")
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
    return f"{option}: {message}, got {shown(item['input'])}" if option else message


def require_plain_text(where: str, value: Any) -> None:
    """Raise LogitcaskError if a text, or one in a list or mapping, is no valid Unicode or holds a NUL character."""
    items, seen = [value], set[int]()
    while items:
        item = items.pop()
        if isinstance(item, str):
            if "\0" in item or item != item.encode(errors="replace").decode():
                raise LogitcaskError(f"{where}: must be valid Unicode text without NUL, got {shown(item)}: correct it")
        elif isinstance(item, list | tuple | dict) and id(item) not in seen:  # YAML's lists may contain themselves
            seen.add(id(item))
            items += [*item, *item.values()] if isinstance(item, dict) else item


def flag_of(name: str) -> str:
    """Return a field's name as typed on the command line: ``--student-config`` for ``student_config``."""
    return "--" + name.rstrip("_").replace("_", "-")  # json_, since pydantic has a json of its own


def read_config(path: Path) -> dict[str, Any]:
    """Return names and values of a YAML config file.

    Raises LogitcaskError if it is not a readable mapping, or gives a name twice: YAML would keep the last value.
    """
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError as error:
        raise LogitcaskError(f"{path}: no such config file") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: such as a 13th month
        reason = " ".join(str(error).split())
        raise LogitcaskError(f"{path}: not a readable YAML file: {reason}") from error
    if not isinstance(config, dict):
        raise LogitcaskError(f"{path}: must be a mapping of option names to values, got {type(config).__name__}")
    return {str(key): value for key, value in config.items()}


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which refuses a mapping with a key given twice, and reads 2:1 as text, not to the base 60."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping. Raises ConstructorError, with the line, if a key is repeated."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given {keys.count(key)} times: give it once", node.start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        """Return an integer, or the text of FIRST:LAST."""
        return node.value if ":" in node.value else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        """Return a number, or the text of FIRST:LAST."""
        return node.value if ":" in node.value else super().construct_yaml_float(node)


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _UniqueKeys.construct_yaml_int)
_UniqueKeys.add_constructor("tag:yaml.org,2002:float", _UniqueKeys.construct_yaml_float)


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
    return {file.stem: file for file in (Path(__file__).parents[2] / "configs" / kind).iterdir() if file.is_file()}


def shard_range(text: str) -> tuple[int, int]:
    """Return FIRST and STOP of ``FIRST:STOP``. Raises LogitcaskError if the text has another form."""
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if not match:
        raise LogitcaskError(f"--shards: must be FIRST:STOP, such as 0:10, got {text!r}")
    return int(match[1]), int(match[2])
