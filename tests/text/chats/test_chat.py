"""Chats by the templates of real models, which TRL ships: what is a target, and what is refused for whose reason."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from logitcask.pipeline.text.chats.chat import ChatError, Segment, cut_chat
from tests.text.chats.real_templates import OLDER, SHAPES, TEMPLATES, TOOLS, assistant, user

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def renderer(name: str) -> Callable[..., str]:
    def render(messages: Any, tools: Any = None, add_generation_prompt: bool = False) -> str:
        texts, _ = render_jinja_template([messages], tools=tools, chat_template=TEMPLATES[name],
                                         add_generation_prompt=add_generation_prompt, **SPECIALS)  # fmt: skip
        return str(texts[0])

    return render


def chat_examples(render: Callable[..., str], messages: list[dict[str, Any]], **options: Any) -> list[list[Segment]]:
    return cut_chat(render, messages, **options).examples


def marked_example(name: str, messages: list[dict[str, Any]]) -> list[Segment]:
    (example,) = chat_examples(renderer(name), messages, marked=marked(name), turns="all")
    return example


def targets(name: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    examples = chat_examples(renderer(name), messages, eos="</s>", **options)
    return [text for example in examples for text, target in example if target]


REASONED = [user("add"), assistant("<think>\nit is easy\n</think>\n\nthree"), user("more"),
            assistant("<think>\nstill so\n</think>\n\nseven")]  # fmt: skip
THINKING = ["deepseek_r1_distill", "glm4moe", "nemotron_3_nano", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"]


@pytest.mark.parametrize("name", THINKING)
def test_reasoning_is_a_target_in_earlier_turns_too(name: str) -> None:
    first, last = targets(name, REASONED)
    assert "it is easy" in first
    assert first.index("it is easy") < first.index("</think>") < first.index("three")
    assert "still so" in last
    assert "it is easy" not in last
    examples = chat_examples(renderer(name), REASONED, eos="</s>")
    if len(examples) == 2:
        assert "it is easy" not in "".join(text for text, _ in examples[1]), "the model does not see it at inference"


@pytest.mark.skipif(OLDER, reason="earlier templates of gpt-oss take reasoning under another name")
@pytest.mark.parametrize("name", ["glm4moe", "gptoss", "nemotron_3_nano", "qwen3", "qwen3_5_think"])
def test_reasoning_content_is_passed_on(name: str) -> None:
    (target,) = targets(name, [user("add"), assistant("three", reasoning_content="one and two")])
    assert target.index("one and two") < target.index("three")


def test_a_generation_prompt_that_opens_reasoning_is_seen_whole() -> None:
    """DeepSeek-R1's template drops reasoning from every answer: the target is what the model had written."""
    (example, _) = chat_examples(renderer("deepseek_r1_distill"), REASONED)
    assert example[0][0].endswith("<｜Assistant｜><think>\n")
    assert example[1] == ("it is easy\n</think>\n\nthree<｜end▁of▁sentence｜>", True)
    ((before, _), (target, _), *_) = chat_examples(renderer("deepseek_r1_distill"), SHAPES["one turn"])[0]
    assert (before[-13:], target) == ("<｜Assistant｜>", "three<｜end▁of▁sentence｜>"), "none was written"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss_mask": 0}])
@pytest.mark.parametrize("name", ["llama3_1", "qwen3"])
def test_a_message_may_say_that_it_is_no_target(name: str, flag: dict[str, Any]) -> None:
    messages = [user("hi"), assistant("draft", **flag), user("again"), assistant("final", weight=1)]
    (target,) = targets(name, messages)
    assert "final" in target
    assert "draft" not in target
    with pytest.raises(ChatError, match="none of weight 1"):
        targets(name, messages[:2])


def test_turns_may_be_chosen() -> None:
    messages = SHAPES["two turns"]
    assert [
        len(chat_examples(renderer("llama3_1"), messages, turns=turns)) for turns in ("auto", "all", "each", "last")
    ] == [1, 1, 2, 1]
    assert len(targets("llama3_1", messages, turns="last")) == 1
    assert len(chat_examples(renderer("qwen3"), messages)) == 2
    with pytest.raises(ChatError, match="rewrites earlier turns"):
        chat_examples(renderer("qwen3"), messages, turns="all")
    with pytest.raises(ChatError, match="no assistant turn"):
        chat_examples(renderer("qwen3"), messages[:1])


def marked(name: str) -> Callable[..., tuple[str, list[tuple[int, int]]]]:
    def render(messages: Any, tools: Any = None) -> tuple[str, list[tuple[int, int]]]:
        texts, places = render_jinja_template([messages], tools=tools, chat_template=TEMPLATES[name],
                                              return_assistant_tokens_mask=True, **SPECIALS)  # fmt: skip
        return str(texts[0]), places[0]

    return render


def test_marks_are_used_and_must_mark_something() -> None:
    segments = marked_example("qwen3_training", SHAPES["one turn"])
    assert [text for text, target in segments if target] == ["<think>\n\n</think>\n\nthree<|im_end|>"]
    with pytest.raises(ChatError, match="no assistant turn"):
        marked_example("qwen3_training", [user("hi")])
    unmarked = chat_examples(renderer("qwen3"), SHAPES["one turn"])
    assert unmarked[0][1] == ("<think>\n\n</think>\n\nthree<|im_end|>", True)
    with pytest.raises(ChatError, match="marks no text"):
        cut_chat(renderer("qwen3"), SHAPES["one turn"], marked=marked("qwen3"))


def test_marks_give_each_turn_what_it_wrote() -> None:
    """LFM 2.5 has marks and drops earlier reasoning: turns are cut, weights hold, arguments may be text."""
    examples = chat_examples(renderer("lfm2_2_5"), REASONED, marked=marked("lfm2_2_5"))
    assert ["it is easy" in text for example in examples for text, target in example if target] == [True, False]
    assert "it is easy" not in examples[1][0][0]
    plain = [user("hi"), assistant("draft", weight=0), user("again"), assistant("final")]
    (example,) = chat_examples(renderer("lfm2_2_5"), plain, marked=marked("lfm2_2_5"))
    assert [text for text, target in example if target] == ["final<|im_end|>"]
    call = {"type": "function", "function": {"name": "plus", "arguments": '{"a": 1}'}}
    chat = [user("?"), assistant(None, tool_calls=[call])]
    (example,) = chat_examples(renderer("lfm2_2_5"), chat, tools=TOOLS, marked=marked("lfm2_2_5"))
    assert "[plus(a=1)]" in example[1][0]


def test_an_answer_that_changes_the_messages_before_it_is_cut_after_its_own_generation_prompt() -> None:
    """gpt-oss drops the reasoning of a tool call once an answer follows: the prompt is that of inference, with it."""
    call = {"type": "function", "function": {"name": "plus", "arguments": {"a": 1}}}
    chat = [user("?"), assistant("", thinking="first", tool_calls=[call]), {"role": "tool", "content": "result 3"},
            assistant("It is three.", thinking="then")]  # fmt: skip
    _, ((prompt, _), (text, _)) = chat_examples(renderer("gptoss"), chat, tools=TOOLS)
    assert "first" in prompt
    assert "result 3" in prompt
    assert text == ("<|channel|>analysis<|message|>then<|end|><|start|>assistant<|channel|>final<|message|>It is three."
                    "<|return|>")  # fmt: skip


def test_the_reason_is_that_of_the_template() -> None:
    call = {"type": "function", "function": {"name": "plus", "arguments": {"a": 1}}}
    for name, messages, reason in (
        ("gemma", [{"role": "system", "content": "Be brief."}, *SHAPES["one turn"]], "System role not supported"),
        ("idefics3", [user("?"), assistant(None, tool_calls=[call])], "drops tool calls"),
        ("qwen3_8", [{"role": "developer", "content": "No."}, *SHAPES["one turn"]], "Unexpected message role"),
    ):
        with pytest.raises(ChatError, match=reason):
            chat_examples(renderer(name), messages)


def test_a_generation_prompt_that_an_answer_does_not_go_through_is_named() -> None:
    (notice,) = cut_chat(renderer("deepseek_r1_distill"), SHAPES["one turn"]).notices
    assert "without '<think>\\n'" in notice
    assert not cut_chat(renderer("nemotron_3_nano"), SHAPES["one turn"]).notices, "a line end alone"
    assert not cut_chat(renderer("llama3_1"), SHAPES["one turn"]).notices
