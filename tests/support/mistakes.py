"""What is printed of a user's mistake: three lines at most."""

import re


def said(err: str) -> str:
    """Return a mistake as one line, of what is wrong and how to fix it, and the same with a semicolon between them.

    ``err`` may hold other lines. Which of both was raised is not printed.
    """
    lines = err.splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, err
    kinds = [line[:7] for line in lines[errors[0] :]][:4]
    assert kinds[1:] in ([], ["fix:   "], ["see:   "], ["fix:   ", "see:   "]), err
    text = "\n".join(line for line in lines[errors[0] :] if not line.startswith("see: "))
    return "\n".join(re.sub(r"\nfix:   ", mark, text) for mark in (": ", "; "))
