"""The page of labels in a real browser: what it shows, keys, hostile texts, many tokens."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from logitcask.cache.labels import Example, soft_labels
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.pages.contents import pack
from logitcask.pipeline.pages.labels import browse, render
from logitcask.pipeline.settings.cache import BrowseSettings
from tests.cache.test_cache import label_settings
from tests.support.needed import lacking
from tests.support.tiny import make_cache, sound_shards

LABEL = label_settings(vocab=300, head=4, draws=8)
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>&lt;\u2028"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        lacking("chromium and its driver are not installed")
    options = ChromeOptions()
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1300,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = str(shutil.which("chromium"))
    os.environ["SE_OFFLINE"] = "true"
    driver = Chrome(options, ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


def opened(browser: Chrome, page: Path) -> WebDriverWait[Chrome]:
    browser.get(page.as_uri())
    wait = WebDriverWait(browser, 60)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "aside dl"))
    return wait


def press(browser: Chrome, *keys: str) -> None:
    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def contents(examples: list[Example], texts: dict[int, str], **changes: Any) -> dict[str, Any]:
    entries = [
        {"index": i, "why": "chosen", "metadata": {}, **pack(example, LABEL, None)[0]}
        for i, example in enumerate(examples)
    ]
    return {
        "cache": "c", "teacher": "t", "student": None, "steps": 256, "head": LABEL.head_size,
        "draws": min(8, LABEL.tail_draws), "drawn": LABEL.tail_draws, "temperatures": LABEL.temperatures,
        "total": len(examples), "texts": texts, "examples": entries, **changes,
    }  # fmt: skip


def test_it_shows_the_labels_and_follows_the_keys(tmp_path: Path, browser: Chrome) -> None:
    make_cache(tmp_path)
    page = tmp_path / "labels.html"
    settings = BrowseSettings.model_validate(
        {
            "cache": str(tmp_path / "cache"),
            "html": page,
            "examples": "2,5",
            "student": str(tmp_path / "teacher"),
            "device": "cpu",
        }
    )
    assert browse(settings) == 2
    wait = opened(browser, page)
    reader = CacheReader(tmp_path / "cache")
    example, label = reader.example(2), reader.manifest.label
    first = int(np.flatnonzero(example.target_mask)[0]) + 1
    fact = browser.find_element(By.CSS_SELECTOR, "aside dd").text
    assert fact == f"{example.input_ids[first]}, place {first}"
    shown = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "aside table:first-of-type td:nth-child(2)")]
    p = np.exp(soft_labels(example.targets, label.temperatures, 1.0, "bucket").log_probs[0])
    for text, probability in zip(shown, p, strict=False):
        assert float(text.removesuffix(" %")) / 100 == pytest.approx(float(probability), rel=0.02)
    assert len(browser.find_elements(By.CSS_SELECTOR, "aside td.student")) > label.head_size
    assert "KL" in browser.find_element(By.CSS_SELECTOR, "section h2").text
    classes = browser.execute_script(
        "return [...document.querySelector('.text').children].map((span) => span.className)"
    )
    wanted = np.concatenate([[False], example.target_mask[:-1]])
    assert ["target" in str(name) for name in classes] == wanted.tolist()

    press(browser, Keys.ARROW_RIGHT)
    wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "aside dd").text.endswith(f"place {first + 1}"))
    press(browser, "n")
    wait.until(lambda b: b.execute_script("return chosen[0].index") == 5)
    press(browser, "p", "/")
    wait.until(lambda b: b.switch_to.active_element.get_attribute("id") == "search")
    word = browser.execute_script("return textOf(data.examples[1].label.ids[3])")
    press(browser, word, Keys.ENTER)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".hit"))
    assert "hits" in browser.find_element(By.ID, "hits").text
    assert word.lower() in browser.execute_script("return document.querySelector('.hit').textContent").lower()
    logged: Any = browser.execute("getLog", {"type": "browser"})["value"]
    assert not [line for line in logged if line["level"] == "SEVERE"]


def test_hostile_texts_stay_text(tmp_path: Path, browser: Chrome) -> None:
    (shard,) = sound_shards(LABEL, [2])
    examples = [shard.example(i) for i in range(2)]
    made = contents(examples, {int(i): HOSTILE for i in examples[0].input_ids}, teacher=HOSTILE, cache=HOSTILE)
    made["examples"][0]["metadata"] = {"language": HOSTILE}
    page = tmp_path / "page.html"
    page.write_text(render(made), encoding="utf-8")
    opened(browser, page)
    assert browser.execute_script("return window.hacked") is None
    assert not browser.find_elements(By.TAG_NAME, "img")
    assert HOSTILE.replace("\u2028", "") in browser.find_element(By.ID, "about").text.replace("\u2028", "")
    assert browser.find_elements(By.CSS_SELECTOR, ".text span")[0].get_property("textContent") == HOSTILE
    blocked = browser.execute_script("""
        const [done] = [window]; const script = document.createElement("script");
        script.textContent = "window.hacked = 1"; document.body.append(script); return window.hacked""")
    assert blocked is None  # the page's policy runs its own script alone


def test_a_page_of_200_000_tokens_makes_only_what_is_in_view(tmp_path: Path, browser: Chrome) -> None:
    shards = sound_shards(LABEL, [400])
    one = shards[0].example(0)
    tokens = len(one.input_ids)
    per_example = 2_000 // tokens + 1
    long = Example(
        np.tile(one.input_ids, per_example),
        np.tile(np.append(one.target_mask[:-1], False), per_example),
        one.targets[np.tile(np.arange(int(one.target_mask[:-1].sum())), per_example)],
    )
    count = 200_000 // len(long.input_ids) + 1
    made = contents([long] * count, {int(i): f" token{i}" for i in one.input_ids})
    page = tmp_path / "page.html"
    page.write_text(render(made), encoding="utf-8")
    wait = opened(browser, page)
    spans = "return document.querySelectorAll('.text span').length"
    assert 0 < browser.execute_script(spans) < 20_000
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    wait.until(lambda b: b.execute_script("return Boolean(data.examples.at(-1).spans)"))
    assert browser.execute_script(spans) < 60_000
    press(browser, "/", "token", Keys.ENTER)
    wait.until(lambda b: b.find_element(By.ID, "hits").text == f"1 of {count * len(long.input_ids):,} hits")
