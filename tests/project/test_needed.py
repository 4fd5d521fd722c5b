"""CI skips no test silently: what a test needs and CI lacks is a failure there."""

import pytest
from _pytest.outcomes import Failed, Skipped

from tests.support.needed import lacking


@pytest.mark.parametrize(("variables", "outcome"), [({"CI": "true"}, Failed), ({"CI": ""}, Skipped)])
def test_what_is_missing_fails_in_ci_and_skips_elsewhere(
    variables: dict[str, str], outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(outcome, match="no sshd"):
        lacking("no sshd")
