"""Records of the shapes that public data sets have: what each becomes, and why some cannot be used."""

import json
from typing import Any

import pytest

from logitcask.pipeline.text.columns import RecordError, shape_record

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}
SHARED = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


@pytest.mark.parametrize(("raw", "messages"), [
    ({"messages": HI}, HI),
    ({"messages": HI, "system": "Be brief."}, [SYSTEM, *HI]),
    ({"messages": [SYSTEM, *HI], "system": "Another."}, [SYSTEM, *HI]),
    ({"conversations": SHARED}, [SYSTEM, *HI]),
    ({"prompt": HI[:1], "completion": HI[1:]}, HI),
    ({"prompt": "hi", "response": "hello", "system": "Be brief."}, [SYSTEM, *HI]),
    ({"prompt": "hi", "prompt_id": "1", "messages": HI}, HI),
])  # fmt: skip
def test_chats(raw: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    record = shape_record(raw, {})
    assert (record.kind, list(record.messages)) == ("chat", messages)


@pytest.mark.parametrize(("raw", "renamed", "prompt", "response"), [
    ({"prompt": "a", "response": "b"}, {}, "a", "b"),
    ({"prompt": "hi", "completion": " hello"}, {}, "hi", " hello"),
    ({"instruction": "Translate", "input": "hi", "output": "salut"}, {}, "Translate\n\nhi", "salut"),
    ({"instruction": "Greet", "input": "", "output": "salut"}, {}, "Greet", "salut"),
    ({"question": "a", "answer": "b"}, {"question": "prompt", "answer": "response"}, "a", "b"),
])  # fmt: skip
def test_prompts(raw: dict[str, Any], renamed: dict[str, str], prompt: str, response: str) -> None:
    record = shape_record(raw, renamed)
    assert (record.kind, record.prompt, record.response) == ("prompt", prompt, response)


def test_texts_and_tokens() -> None:
    assert shape_record({"text": "abc"}, {}).text == "abc"
    tokens = shape_record({"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1, 1]}, {})
    assert (tokens.kind, tokens.tokens) == ("tokens", {"input_ids": [5, 6], "labels": [-100, 6]})
    assert tokens.unused == {"attention_mask"}


def test_other_columns_are_named() -> None:
    assert shape_record({"prompt": "a", "response": "b", "source": "x", "score": 0.5}, {}).unused == {"source", "score"}
    assert shape_record({"prompt": "a", "messages": HI}, {}).unused == {"prompt"}
    assert shape_record({"prompt": "a", "response": "b", "category": "c", "language": "python"}, {}).unused == set()
    assert shape_record({"messages": HI, "score": None}, {}).unused == set(), "null columns are not there"


def test_messages_keep_what_templates_read() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [{"role": "user", "content": "?", "name": None},
                {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1}]  # fmt: skip
    record = shape_record({"messages": messages, "tools": [{"name": "add"}]}, {})
    assert record.messages[0] == {"role": "user", "content": "?"}
    assert record.messages[1] == messages[1]
    assert record.tools == ({"name": "add"},)


@pytest.mark.parametrize(("raw", "reason"), [
    ({"prompt": "a", "response": None}, r"has columns \['prompt'\], null: \['response'\]; needs messages"),
    ({"prompt": "a", "response": " \n"}, "response is empty"),
    ({"prompt": "a", "response": 3}, "response must be a string, got int"),
    ({"prompt": "a", "response": "Here \ud83d you go"}, "half a surrogate pair, at character 5"),
    ({"text": "a\0b"}, "NUL"),
    ({"messages": []}, "must be a list that is not empty"),
    ({"messages": "hi"}, "must be a list that is not empty, got str"),
    ({"messages": [*HI[:1], {"role": "assistant", "content": ""}]}, "assistant message is empty"),
    ({"messages": [{"content": "hi"}]}, "must have a role"),
    ({"messages": [{"role": "user", "content": 5}]}, "content must be a string or a list of text parts, got int"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "only text is supported"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "surrogate"),
    ({"messages": ["hi"]}, "a message must be an object, got str"),
    ({"a": 1}, r"has columns \['a'\]; needs messages"),
])  # fmt: skip
def test_bad_records_say_why(raw: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        shape_record(raw, {})


CALL = {"type": "function", "function": {"name": "plus", "arguments": '{"a": 1}'}}


def test_tools_and_calls_may_be_json_text() -> None:
    """Arrow has one schema per column, so data sets of tools hold them as text."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}]
    record = shape_record({"messages": chat, "tools": json.dumps([{"name": "plus"}])}, {})
    assert record.messages[1]["tool_calls"] == [CALL]
    assert record.tools == ({"name": "plus"},)
    with pytest.raises(RecordError, match="tools must be a list"):
        shape_record({"messages": chat, "tools": "plus"}, {})


def test_sharegpts_calls_and_observations_are_those_of_tools() -> None:
    turns = [("Human", "?"), ("function_call", '{"name": "plus", "arguments": {"a": 1}}'), ("observation", "3"),
             ("gpt", "Three.")]  # fmt: skip
    record = shape_record({"conversations": [{"from": role, "value": text} for role, text in turns]}, {})
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "plus", "arguments": {"a": 1}}}
    ]
    with pytest.raises(RecordError, match="must be JSON with name and arguments"):
        shape_record({"conversations": [{"from": "function_call", "value": "plus"}]}, {})


def test_an_empty_list_of_calls_is_none_and_roles_may_have_capitals() -> None:
    chat = [{"role": "User", "content": "?"}, {"role": "Assistant", "content": "a", "tool_calls": []}]
    record = shape_record({"messages": chat}, {})
    assert record.messages == ({"role": "user", "content": "?"}, {"role": "assistant", "content": "a"})


@pytest.mark.parametrize("broken", ["half \ud83d", "a\0b"])
@pytest.mark.parametrize("key", ["reasoning_content", "tool_calls", "name", "tools"])
def test_a_string_that_no_tokenizer_takes_is_named_wherever_it_is(key: str, broken: str) -> None:
    value: Any = {"tool_calls": [{"function": {"name": "plus", "arguments": {"a": broken}}}], "tools": [{broken: 1}]}
    value = value.get(key, broken)
    message = {"role": "assistant", "content": "a", **({} if key == "tools" else {key: value})}
    with pytest.raises(RecordError, match=f"{key} (holds half a surrogate pair|contains a NUL)"):
        shape_record({"messages": [message], **({"tools": value} if key == "tools" else {})}, {})
