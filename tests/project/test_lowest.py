"""The constraints of ``just test-lowest`` are the lowest versions that the metadata admits."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def test_each_direct_dependency_is_constrained_to_its_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {}
    for each in map(Requirement, project["dependencies"]):
        (bounds[each.name],) = (Version(part.version) for part in each.specifier if part.operator == ">=")
    lines = (ROOT / "configs/lowest.txt").read_text().splitlines()
    constraints = {}
    for each in (Requirement(line) for line in lines if not line.startswith("#")):
        (constraints[each.name],) = (Version(part.version) for part in each.specifier if part.operator == "==")
    assert constraints == bounds
