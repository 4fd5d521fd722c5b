"""The layouts of DistillKit, axolotl and servers, against DistillKit's own numbers and against plain columns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from transformers import AutoTokenizer

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.labels_from.distillkit import Compression, Legacy, read_distillkit
from logitcask.pipeline.labels_from.openai import ids_by_bytes
from tests.labels_from.test_import import TEXTS, K, bring, labels_of, manifest_of, require_labels, tokenizer
from tests.support.foreign import Drawn, top_k_row
from tests.support.tiny import make_tokenizer

__all__ = ["bring", "tokenizer"]  # fixtures
STORED = json.loads((Path(__file__).parent / "stored" / "distillkit.json").read_text())["presets"]
RAW = {"d": 300, "k": K, "exact_k": K, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}


@pytest.mark.parametrize("preset", STORED)
def test_distillkits_own_rows_are_read_as_it_reads_them(preset: str) -> None:
    stored = STORED[preset]
    row = dict(stored["row"])
    for name in ("compressed_logprobs", "bytepacked_indices"):
        if name in row:
            row[name] = np.frombuffer(bytes.fromhex(row[name]), dtype=np.uint8).reshape(2, -1).tolist()
    kind = Legacy if "vocab_size" in stored["settings"] else Compression
    (text,) = read_distillkit(
        {"input_ids": [1, 2, 3], **row}, kind.model_validate(stored["settings"]), make_tokenizer()
    )
    np.testing.assert_array_equal(text.ids.reshape(-1), np.frombuffer(bytes.fromhex(stored["ids"]), np.uint16))
    want = np.frombuffer(
        bytes.fromhex(stored["values"]), np.float32
    )  # sums of few terms: another CPU may round otherwise
    np.testing.assert_allclose(text.values.reshape(-1), want, rtol=0, atol=0.02 if preset == "half terms" else 1e-5)


def pack(values: Any, bits: int) -> list[list[int]]:
    """Return rows of numbers as bytes, each number's highest bit first."""
    flags = (np.asarray(values)[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    rows: list[list[int]] = np.packbits(flags.reshape(len(flags), -1).astype(np.uint8), axis=1).tolist()
    return rows


def packed_row(text: Drawn) -> dict[str, Any]:
    ids, values = text.top(K)
    return {
        "input_ids": text.ids.tolist(),
        "compressed_logprobs": values[:-1].copy().view(np.uint8).tolist(),
        "bytepacked_indices": pack(ids[:-1], 9),
    }


@pytest.mark.parametrize("packed", [False, True])
def test_distillkits_parquet_becomes_a_cache(packed: bool, bring: Any, tmp_path: Path) -> None:
    """Packed rows, several texts each, are cut at the texts' borders."""
    folder = tmp_path / "capture"
    folder.mkdir()
    rows = [packed_row(text) for text in TEXTS]
    if packed:  # as DistillKit packs: tokens cut to the rows there are, a number per text
        for row in rows:
            row["input_ids"].pop()
        rows = [
            {
                **{name: rows[i][name] + rows[i + 1][name] for name in rows[i]},
                "attention_mask": [1] * len(rows[i]["input_ids"]) + [2] * len(rows[i + 1]["input_ids"]),
            }
            for i in range(0, len(rows), 2)
        ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data_0.parquet")
    with pytest.raises(LogitcaskError, match="give these settings with --compression-config"):
        bring(folder, format="distillkit")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(RAW))
    bring(folder, format="distillkit")
    texts = [Drawn(text.ids[:-1], text.log_p[:-1]) for text in TEXTS] if packed else TEXTS
    require_labels(tmp_path / "cache", texts, K)
    assert manifest_of(tmp_path / "cache").teacher.engine == "import distillkit"


def test_a_training_configs_settings_of_another_size_are_refused(bring: Any, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"teacher": {"kind": "dataset", "logprob_compressor": {**RAW, "exact_k": K - 1}}}))
    with pytest.raises(LogitcaskError, match="compressed_logprobs: must be 20 bytes per row by the compression sett"):
        bring([packed_row(text) for text in TEXTS], format="distillkit", compression_config=str(config))
    with pytest.raises(ValueError, match="--compression-config applies to --format distillkit"):
        bring([], compression_config=str(config))


@pytest.mark.parametrize("shifted", [False, True])
def test_axolotls_prepared_columns(shifted: bool, bring: Any, tmp_path: Path) -> None:
    """Rows before the answer are -inf; a row stands at its token, or one before, as versions of axolotl differ."""
    rows = []
    for text in TEXTS:
        ids, values = text.top(K)
        wide = np.where(np.arange(len(ids))[:, None] < 3, -np.inf, values)
        place = slice(None, -1) if shifted else slice(None)
        front = 1 if shifted else 0
        rows.append(
            {
                "input_ids": text.ids.tolist(),
                "labels": [-100] * 4 + text.ids[4:].tolist(),
                "target_token_ids": [[0] * K] * front + ids[place].tolist(),
                "target_logprobs": [[-1e9] * K] * front + wide[place].tolist(),
                "target_mask": [[1] * K] * len(ids),
            }
        )
    bring(rows, format="axolotl")
    for (_, mask, targets), text in zip(labels_of(tmp_path / "cache"), TEXTS, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(3, len(mask) - 1))
        np.testing.assert_array_equal(targets.head_ids, text.top(K)[0][3:-1])


def chat_world(folder: Path) -> tuple[str, Any, list[tuple[list[dict[str, str]], Any, Drawn]]]:
    """Return a chat tokenizer, and chats whose answers are drawn tokens of printable text."""
    made = make_tokenizer(chat=True)
    made.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    random = np.random.default_rng(0)
    plain = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isascii() and i not in tokenizer.all_special_ids]
    table = np.full((len(tokenizer), len(tokenizer)), -30.0)
    table[:, plain] = random.normal(0, 3, (len(tokenizer), len(plain)))
    table -= np.log(np.exp(table).sum(1, keepdims=True))
    chats = []
    for number in range(8):
        messages = [{"role": "user", "content": f"count {number}"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        ids = list(prompt)
        while len(ids) < len(prompt) + 12:
            ids.append(int(random.choice(len(table), p=np.exp(table[ids[-1]]) / np.exp(table[ids[-1]]).sum())))
        chats.append((messages, len(prompt), Drawn(np.array(ids), table[ids])))
    return str(folder), tokenizer, chats


@pytest.mark.parametrize("named", [False, True], ids=["text", "token_id"])
@pytest.mark.parametrize("wrapped", ["response", "batch", "bare"])
def test_chat_completions_with_top_logprobs(named: bool, wrapped: str, bring: Any, tmp_path: Path) -> None:
    folder, tokenizer, chats = chat_world(tmp_path / "chat")
    by_bytes = {index: data for data, index in ids_by_bytes(tokenizer).items()}

    def entry(token: int, value: float) -> dict[str, Any]:
        data = by_bytes[token]
        text = f"token_id:{token}" if named else data.decode("utf-8", "replace")
        return {"token": text, "logprob": value, "bytes": None if named else list(data)}

    rows = []
    for messages, start, text in chats:
        ids, values = text.top(K)
        content = [
            {
                **entry(int(text.ids[t + 1]), float(text.log_p[t][text.ids[t + 1]])),
                "top_logprobs": [entry(int(i), float(v)) for i, v in zip(ids[t], values[t], strict=True)],
            }
            for t in range(start - 1, len(ids) - 1)
        ]
        reply = {"object": "chat.completion", "choices": [{"index": 0, "logprobs": {"content": content}}]}
        inner: dict[str, Any] = {"response": {"body": reply} if wrapped == "batch" else reply}
        rows.append({"messages": messages, **(reply if wrapped == "bare" else inner)})
    bring(rows, format="openai", tokenizer=folder)
    label = manifest_of(tmp_path / "cache").label
    assert (label.head_size, label.unknown) == (K, None)  # a reply gives its own tokens' log-probabilities
    for (got, mask, targets), (_, start, text) in zip(labels_of(tmp_path / "cache"), chats, strict=True):
        np.testing.assert_array_equal(got, text.ids)
        np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(start - 1, len(got) - 1))
        np.testing.assert_array_equal(targets.head_ids, text.top(K)[0][start - 1 : -1])


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_scored_prompts_of_servers(server: str, bring: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for text in TEXTS:
        (ids, values), lines = text.top(K), []
        for t in range(len(ids) - 1):
            own = int(text.ids[t + 1])
            rank = int((text.log_p[t] > text.log_p[t][own]).sum()) + 1
            lines.append(
                [(own, float(text.log_p[t][own]), rank)] * (rank > K)
                + [(int(i), float(v), r) for r, (i, v) in enumerate(zip(ids[t], values[t], strict=True), start=1)]
            )
        if server == "vllm":
            scored = [None, *({str(i): {"logprob": v, "rank": r} for i, v, r in line} for line in lines)]
            rows.append({"response": {"prompt_token_ids": text.ids.tolist(), "prompt_logprobs": scored}})
        else:
            own_values = [float(text.log_p[t][text.ids[t + 1]]) for t in range(len(ids) - 1)]
            meta = {
                "input_token_logprobs": [[v, int(i), None] for v, i in zip([None, *own_values], text.ids, strict=True)],
                "input_top_logprobs": [None, *([[v, i, None] for i, v, r in line if r <= K] for line in lines)],
            }
            rows.append({"response": {"text": "", "meta_info": meta}})
    bring(rows, format="openai")
    require_labels(tmp_path / "cache", TEXTS, K)
    assert manifest_of(tmp_path / "cache").label.unknown is None


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"messages": [], "response": {"choices": [{"message": {}}]}}, "has no log-probabilities: must have response"),
        ({"response": {"choices": [{"logprobs": {"content": [{"token": "a"}]}}]}}, "has no prompt: must have messages"),
        (
            {"prompt": "a", "response": {"choices": [{"logprobs": {"content": [{"token": "a"}]}}]}},
            "must have token, lo",
        ),
        (
            {"prompt": "a", "response": {"choices": [{"logprobs": {"content": [{"token": "zzzq"}]}}]}},
            "is not in the vo",
        ),
        ({"response": {"prompt_logprobs": [None, {}]}}, "need prompt_token_ids beside them"),
        ({"response": "hello"}, "has no log-probabilities"),
        ({"response": {"meta_info": {"input_top_logprobs": []}}}, "is no reply with log-probabilities: KeyError"),
    ],
)
def test_replies_without_labels_are_refused(record: dict[str, Any], rule: str, bring: Any) -> None:
    with pytest.raises(LogitcaskError) as caught:
        bring([record], format="openai")
    assert rule in str(caught.value)
    assert "rows.jsonl:1" in str(caught.value)


def test_axolotls_unprepared_records(bring: Any, tmp_path: Path) -> None:
    """``messages`` with a row for each of the last tokens: numbers, or objects that name their token."""
    folder, tokenizer, _ = chat_world(tmp_path / "chat")
    random, rows = np.random.default_rng(0), []
    for number in range(6):
        messages = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": f"There are {number}"}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        others = np.array([random.choice(250, 3, replace=False) for _ in ids])
        tops = [
            [token, *[o for o in other.tolist() if o != token][:2]] for token, other in zip(ids, others, strict=True)
        ]
        values = [[-0.2, -2.0, -4.0]] * len(ids)
        named = [
            [{"token": f"token_id:{i}", "logprob": v} for i, v in zip(*row, strict=True)]
            for row in zip(tops, values, strict=True)
        ]
        answer = slice(-6, None)
        rows.append({"messages": messages, "logprobs": named[answer]})
        rows.append({"messages": messages, "logprobs": values[answer], "target_token_ids": tops[answer]})
    bring(rows, format="axolotl", tokenizer=folder)
    for ids, mask, targets in labels_of(tmp_path / "cache"):
        np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(len(ids) - 7, len(ids) - 1))
        np.testing.assert_array_equal(targets.head_ids[:, 0], ids[-6:])


def test_plain_columns_of_other_tools(bring: Any, tmp_path: Path) -> None:
    rows = [top_k_row(text, K) for text in TEXTS]
    renamed = [{"tokens": r["input_ids"], "top_ids": r["token_ids"], "logprobs": r["logprobs"]} for r in rows]
    bring(renamed, columns="input_ids=tokens,token_ids=top_ids")
    require_labels(tmp_path / "cache", TEXTS, K)
