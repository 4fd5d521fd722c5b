"""Settings of data generation: which options each provider takes, prices, URLs."""

import json
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.settings.base import resolve
from logitcask.pipeline.settings.generate_data import GenerateDataSettings

GOOD = {"output_dir": "o", "provider": "openai", "model": "m", "prompts": "p.yaml"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"provider": "mistral"}, "--provider: must be 'source', 'openai', 'anthropic', 'openai-compatible'"),
        ({"provider": "openai-compatible"}, "--provider openai-compatible needs --base-url"),
        ({"provider": "openai", "base_url": "http://x/v1"}, "--provider openai does not take --base-url: leave it out"),
        (
            {"provider": "anthropic", "temperature": 0.5},
            "--provider anthropic does not take --temperature: leave it out",
        ),
        ({"provider": "local", "max_cost": 1}, "--provider local does not take --max-cost: leave it out"),
        ({"provider": "source"}, "--provider source does not take --model, --prompts: leave it out"),
        ({"source_dir": "d"}, "--provider openai does not take --source-dir: leave it out"),
        ({"model": None}, "--provider openai needs --model"),
        ({"prompts": None}, "--provider openai needs --prompts"),
        ({"max_cost": 1}, "--max-cost needs the price of m: add --prices m=INPUT/OUTPUT"),
        ({"max_cost": 1, "prices": "n=1/2"}, "--max-cost needs the price of m"),
        ({"max_cost": "nan", "prices": "m=1/2"}, "--max-cost: must be a finite number"),
        ({"prices": "m=1"}, "--prices: must be MODEL=INPUT/OUTPUT"),
        ({"prices": "1/2"}, "--prices: must be MODEL=INPUT/OUTPUT"),
        ({"prices": "m=1/x"}, "--prices: must be a valid number"),
        ({"prices": "m=1/-2"}, "--prices: must be greater than or equal to 0"),
        ({"prices": {"m": [1]}}, "--prices: must give [INPUT, OUTPUT]"),
        ({"concurrency": 0}, "--concurrency: must be greater than or equal to 1, got 0"),
        ({"validation_fraction": 1}, "--validation-fraction: must be less than 1"),
        ({"near_duplicate": 0}, "--near-duplicate: must be greater than 0"),
        ({"temperature": -1}, "--temperature: must be greater than or equal to 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    values = {name: value for name, value in {**GOOD, **given}.items() if value is not None}
    with pytest.raises(LogitcaskError) as refused:
        resolve(GenerateDataSettings, None, values)
    assert message in str(refused.value)


URLS = (
    *("x", "ftp://h/v1", "http://", "http://u:secret@h/v1", "http://secret@h/", "http://h/v1?key=secret"),
    *("http://h/#secret", "http://[secret/v1", "http://h:secret/v1"),
)


@pytest.mark.parametrize("url", URLS)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(LogitcaskError, match="--base-url must be http:// or https://") as refused:
        resolve(GenerateDataSettings, None, {**GOOD, "provider": "openai-compatible", "base_url": url})
    assert "secret" not in str(refused.value)


def test_prices_from_a_flag_and_a_file_are_the_same(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({**GOOD, "prices": {"m": [0.25, 2], "a/b=c": [1, 2]}, "max_cost": 1}))
    from_file = resolve(GenerateDataSettings, config, {})
    flags = {**GOOD, "prices": "m=0.25/2, a/b=c=1/2", "max_cost": "1"}
    assert from_file == resolve(GenerateDataSettings, None, flags)
    assert from_file.prices == {"m": (0.25, 2), "a/b=c": (1, 2)}
