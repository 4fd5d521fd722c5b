"""Chats by the templates of real models, which TRL ships: what is a target, and what is refused for whose reason."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from logitcask.pipeline.text.chats.chat import ChatError, Segment, cut_chat

(TRL,) = list((importlib.util.find_spec("trl") or pytest.fail("trl is missing")).submodule_search_locations or [])
TEMPLATES = {path.stem: path.read_text() for path in sorted(Path(TRL, "chat_templates").glob("*.jinja"))}
ORIGINAL = [name for name in TEMPLATES if not name.endswith("_training")]
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


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def targets(name: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    examples = chat_examples(renderer(name), messages, eos="</s>", **options)
    return [text for example in examples for text, target in example if target]


FIVE = [message for n in range(5) for message in (user(f"question {n}"), assistant(f"answer {n}"))]
PLAIN = {
    "one turn": [user("add 1 and 2"), assistant("three")],
    "two turns": [user("add 1 and 2"), assistant("three"), user("and 4?"), assistant("seven")],
    "five turns": FIVE,
    "a trailing user turn": [user("good day"), assistant("hello"), user("good night")],
}


@pytest.mark.parametrize("name", ORIGINAL)
@pytest.mark.parametrize("shape", PLAIN)
def test_every_template_takes_plain_chats(name: str, shape: str) -> None:
    """Each answer is one target, from after the generation prompt to the end of its turn; no question is in one."""
    messages = PLAIN[shape]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    found = targets(name, messages)
    assert len(found) == len(answers)
    for text, answer in zip(found, answers, strict=True):
        assert text.count(answer) == 1
        assert not any(message["content"] in text for message in messages if message["role"] == "user")
        after = text.split(answer)[1]
        assert after.strip() == after
        assert after.endswith(">") or name.startswith("glm4moe"), "GLM's turns end where the next one begins"


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_text_before_a_target_is_what_the_model_sees(name: str) -> None:
    """Each turn rendered with the generation prompt, or as much of it as an answer without reasoning goes through."""
    render = renderer(name)
    if name in ("idefics3", "llava_next", "smolvlm"):
        pytest.skip("takes content in parts alone")
    for example in chat_examples(render, PLAIN["two turns"], turns="each", eos="</s>"):
        (before, _), _ = example
        place = 3 if "and 4?" in before else 1
        assert render(PLAIN["two turns"][:place], add_generation_prompt=True).startswith(before)


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


@pytest.mark.parametrize("name", ["glm4moe", "gptoss", "nemotron_3_nano", "qwen3", "qwen3_5_think"])
def test_reasoning_content_is_passed_on(name: str) -> None:
    (target,) = targets(name, [user("add"), assistant("three", reasoning_content="one and two")])
    assert target.index("one and two") < target.index("three")


def test_a_generation_prompt_that_opens_reasoning_is_seen_whole() -> None:
    """DeepSeek-R1's template drops reasoning from every answer: the target is what the model had written."""
    (example, _) = chat_examples(renderer("deepseek_r1_distill"), REASONED)
    assert example[0][0].endswith("<｜Assistant｜><think>\n")
    assert example[1] == ("it is easy\n</think>\n\nthree<｜end▁of▁sentence｜>", True)
    ((before, _), (target, _), *_) = chat_examples(renderer("deepseek_r1_distill"), PLAIN["one turn"])[0]
    assert (before[-13:], target) == ("<｜Assistant｜>", "three<｜end▁of▁sentence｜>"), "none was written"


TOOLS = [{"type": "function", "function": {"name": "plus", "description": "sum", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "description": "one"}}, "required": ["a"]}}}]  # fmt: skip


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize("name", ORIGINAL)
def test_tool_calls_are_targets_or_refused(name: str, arguments: Any, content: str | None) -> None:
    call = {"type": "function", "function": {"name": "plus", "arguments": arguments}}
    messages = [user("one and two?"), assistant(content, tool_calls=[call]), {"role": "tool", "content": "result 3"},
                assistant("It is three.")]  # fmt: skip
    try:
        found = targets(name, messages, tools=TOOLS)
    except ChatError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "drops" in refused or "refuses" in refused, refused
        return
    assert len(found) == 2
    assert "plus" in found[0]
    assert "None" not in found[0]
    assert "three" in found[1]
    assert not any("result 3" in text for text in found)


def test_most_templates_take_tool_calls() -> None:
    call = {"type": "function", "function": {"name": "plus", "arguments": {"a": 1}}}
    messages = [user("?"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "3"}, assistant("Three.")]
    taken = []
    for name in ORIGINAL:
        try:
            taken.append(bool(targets(name, messages, tools=TOOLS)))
        except ChatError:
            continue
    assert len(taken) >= 22


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_role_that_a_template_drops_is_reported(name: str) -> None:
    messages = [{"role": "developer", "content": "No lists at all."}, user("hi"), assistant("hello")]
    try:
        shown = "".join(text for text, _ in chat_examples(renderer(name), messages, eos="</s>")[0])
    except ChatError as error:
        shown = str(error)
    assert any(sign in shown for sign in ("No lists at all.", "of role 'developer'", "refuses it"))


@pytest.mark.parametrize(
    "name",
    [name for name in ORIGINAL if not name.startswith(("gemma", "qwen3_5", "qwen3_6", "qwen3_8", "cohere", "llava"))],
)
def test_an_assistant_may_come_first(name: str) -> None:
    found = targets(name, [assistant("Welcome"), user("hi"), assistant("hello")])
    assert ["Welcome" in found[0], "hello" in found[1]] == [True, True]


@pytest.mark.parametrize("name", ORIGINAL)
def test_content_in_parts(name: str) -> None:
    parts = [{"type": "text", "text": "first half, "}, {"type": "text", "text": "second"}]
    examples = chat_examples(renderer(name), [{"role": "user", "content": parts}, assistant("hello")], eos="</s>")
    text = "".join(text for text, _ in examples[0])
    assert "first half" in text
    assert "second" in text


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
    messages = PLAIN["two turns"]
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


TRAINING = [
    name for name in ORIGINAL if f"{name}_training" in TEMPLATES and name not in ("idefics3", "smolvlm", "llava_next")
]
PROMPTED = {  # what TRL labels although the generation prompt gives it
    "deepseek_r1_distill": "<｜Assistant｜>", "deepseekv3": "<｜Assistant｜>", "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant", "qwen2_5": "\n", "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), "<think>\n"),
    **{name: "<think>" for name in ORIGINAL if name.startswith("nemotron_3")},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINING)
def test_masks_are_trls_but_for_what_a_model_does_not_write(name: str) -> None:
    """TRL's training templates label white space after the end of a turn and, some, parts of the generation prompt.

    Two more differences: GLM's turns end with the next one's <|user|>, which TRL adds and the original template does
    not write; and gpt-oss's earlier answers end with <|end|> there, with the <|return|> of its inference here.
    """
    messages = PLAIN["two turns"]
    text, blocks = marked(f"{name}_training")(messages)
    theirs = "".join(text[start:end].rstrip() for start, end in blocks)
    ours = "".join(PROMPTED.get(name, "") + text for text in targets(name, messages))
    theirs = theirs.replace("</s>", "") if name.startswith("phi3") else theirs
    theirs = theirs.replace("<|user|>", "") if name == "glm4moe" else theirs
    theirs = theirs.replace("<|end|>", "<|return|>") if name == "gptoss" else theirs
    assert theirs.replace("\n<turn|>", "<turn|>") == ours


def test_marks_are_used_and_must_mark_something() -> None:
    segments = marked_example("qwen3_training", PLAIN["one turn"])
    assert [text for text, target in segments if target] == ["<think>\n\n</think>\n\nthree<|im_end|>"]
    with pytest.raises(ChatError, match="no assistant turn"):
        marked_example("qwen3_training", [user("hi")])
    unmarked = chat_examples(renderer("qwen3"), PLAIN["one turn"])
    assert unmarked[0][1] == ("<think>\n\n</think>\n\nthree<|im_end|>", True)
    with pytest.raises(ChatError, match="marks no text"):
        cut_chat(renderer("qwen3"), PLAIN["one turn"], marked=marked("qwen3"))


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


@pytest.mark.parametrize("name", ORIGINAL)
def test_no_template_prints_parts_as_python(name: str) -> None:
    parts = [{"type": "text", "text": "first half, "}, {"type": "text", "text": "second"}]
    chat = [{"role": "user", "content": parts}, assistant("hello")]
    text = "".join(text for example in chat_examples(renderer(name), chat, eos="</s>") for text, _ in example)
    assert "'text':" not in text
    assert '"text":' not in text


def test_the_reason_is_that_of_the_template() -> None:
    call = {"type": "function", "function": {"name": "plus", "arguments": {"a": 1}}}
    for name, messages, reason in (
        ("gemma", [{"role": "system", "content": "Be brief."}, *PLAIN["one turn"]], "System role not supported"),
        ("idefics3", [user("?"), assistant(None, tool_calls=[call])], "drops tool calls"),
        ("qwen3_8", [{"role": "developer", "content": "No."}, *PLAIN["one turn"]], "Unexpected message role"),
    ):
        with pytest.raises(ChatError, match=reason):
            chat_examples(renderer(name), messages)


def test_a_generation_prompt_that_an_answer_does_not_go_through_is_named() -> None:
    assert cut_chat(renderer("nemotron_3_nano"), PLAIN["one turn"]).unseen == "\n"
    assert cut_chat(renderer("deepseek_r1_distill"), PLAIN["one turn"]).unseen == "<think>\n"
    assert cut_chat(renderer("llama3_1"), PLAIN["one turn"]).unseen == ""
