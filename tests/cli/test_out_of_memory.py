"""Commands other than train that run out of memory: the allocator really fails, and the error is one line."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.forked import alone
from tests.support.mistakes import said
from tests.support.tiny import RECORDS, make_cache, make_teacher, make_tokenizer, write_jsonl

LIMIT = 1 << 30  # bytes beyond what a process has after its imports; threads take a few hundred MB of it


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model 60,000 features wide, 240 kB per token and product, and a cache for its tokenizer."""
    folder = tmp_path_factory.mktemp("stock")
    data = str(write_jsonl(folder / "train.jsonl", RECORDS * 6))
    make_cache(folder, make_teacher(folder / "teacher"), train_data=data)
    tokenizer = make_tokenizer()
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=60_000, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "wide")
    tokenizer.save_pretrained(folder / "wide")
    return folder


@pytest.mark.parametrize(
    ("command", "too_much", "enough", "remedy"),
    [
        ("precompute-logits --teacher-model {}/wide --train-data {}/train.jsonl --output {}/new --max-seq-length 64",
         "--batch-size=900", "--batch-size=1", ("--batch-size from 900", "--max-seq-length from 64", "--dtype")),
        ("evaluate --model {}/wide --cache {}/cache", "--batch-size=144", "--batch-size=1", ("--batch-size from 144",)),
        ("generate --model {}/wide --max-new-tokens 9", "--prompt=" + "apples " * 2400, "--prompt=apples",
         ("--max-new-tokens from 9", "shorter --prompt")),
    ],
    ids=["precompute-logits", "evaluate", "generate"],
)  # fmt: skip
def test_running_out_of_memory_is_one_line_with_a_remedy(
    command: str, too_much: str, enough: str, remedy: tuple[str, ...], stock: Path, tmp_path: Path
) -> None:
    words = [*command.replace("{}", str(stock)).split(), "--device=cpu"]
    failed = alone(tmp_path, [*words, too_much], limit=LIMIT)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr, failed.stderr
    line = said(failed.stderr)
    assert line.startswith("error: memory ran out (")
    assert "can't allocate memory" in line
    assert [part for part in remedy if part not in line] == []
    succeeded = alone(tmp_path, [*words, enough], limit=LIMIT)
    assert succeeded.returncode == 0, succeeded.stderr  # neither the limit nor the failed run's leftovers stop a run
