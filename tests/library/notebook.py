"""The notebook as a page of the manual. ``python -m tests.library.notebook EXECUTED.ipynb`` writes it, with a picture.

It is executed by ``jupyter nbconvert --to notebook --execute tests/library/library.ipynb``, with CACHE and STUDENT set.
"""

import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOK = Path(__file__).with_name("library.ipynb")
DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = DOCS / "guides" / "notebook.md", DOCS / "pictures" / "notebook.png"


def parts(notebook: Any) -> Iterator[str]:
    """Yield the parts of the page: text, code, and what the code printed or drew."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield cell.source
            continue
        yield f"```py\n{cell.source}\n```"
        outputs = cell.get("outputs", [])
        printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
        if printed:
            yield f"```text\n{printed.rstrip()}\n```"
        if any("image/png" in output.get("data", {}) for output in outputs):
            yield f"![What the last cell draws](../pictures/{PICTURE.name})"


def main(executed: Path) -> None:
    """Write the page and its picture."""
    notebook = nbformat.read(executed, as_version=4)
    PAGE.write_text("\n\n".join(parts(notebook)) + "\n", encoding="utf-8")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    (picture,) = (output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    PICTURE.write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
