"""The systems that store labels, by the checkouts that are given."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.rivals import axolotl, distillkit, maxtext, ours
from tests.benchmarks.rivals.systems import System, Text

GIVEN = {"DistillKit": "distillkit", "axolotl": "axolotl", "MaxText": "maxtext"}  # rivals and their options


def stores(paths: Mapping[str, str], text: Text) -> list[System]:
    """Return ours and those rivals that store labels and whose checkouts are given."""
    found = [ours.load(text)]
    if "distillkit" in paths:
        checkout = Path(paths["distillkit"])
        small = distillkit.load(checkout, text, "DistillKit, k=50", distillkit.BUDGET)
        alone = tuple(loss._replace(timed=False) for loss in small.losses if loss.name == "KL alone")
        found += [distillkit.load(checkout, text), replace(small, losses=alone)]
    if "axolotl" in paths:
        found.append(axolotl.load(Path(paths["axolotl"]), text))
    return found


def learned_only(paths: Mapping[str, str], text: Text) -> list[System]:
    """Return the systems of which only the students are compared: ours with larger labels, MaxText if it is given."""
    return [*ours.larger(text), *([maxtext.load(Path(paths["maxtext"]), text)] if "maxtext" in paths else [])]
