"""Nothing of a chat is ignored silently: weights choose the targets, and what the template drops is an error."""

import pytest

from logitcask.pipeline.text.columns import RecordError
from logitcask.pipeline.text.examples import Encoder
from tests.support.tiny import make_tokenizer

QWEN_LIKE = (  # names, reasoning and tool calls are rendered where they are given; developer turns are not
    "{% for m in messages %}{% if m.role != 'developer' %}<|im_start|>{{ m.role }}"
    "{% if m.name is defined %} {{ m.name }}{% endif %}{{ '\n' }}"
    "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content | trim }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def targets(*messages: dict[str, object], template: str | None = None, prompt_loss: bool = False) -> str:
    """Return the text of a chat's targets."""
    tokenizer = make_tokenizer(chat=True)
    if template is not None:
        tokenizer.chat_template = template
    encoded = Encoder(tokenizer, prompt_loss=prompt_loss).examples({"messages": list(messages)})[0]
    text: str = tokenizer.decode(encoded.input_ids[1:][encoded.target_mask[:-1]].tolist())
    return text


def user(content: str = "hi", **more: object) -> dict[str, object]:
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), (0.0, 1.0), (0, None)])
def test_a_turn_of_weight_0_is_no_target(off: object, on: object) -> None:
    chat = (user(), assistant("draft", weight=off), user("again"), assistant("final", weight=on))
    assert targets(*chat) == "final<|im_end|>"
    everything = targets(*chat, prompt_loss=True)
    assert "draft" not in everything
    assert "hi" in everything
    assert "final" in everything


def test_a_weight_changes_no_token() -> None:
    encoder = Encoder(make_tokenizer(chat=True), prompt_loss=False)
    chats = [
        [user(), assistant("draft", **weight), user("again"), assistant("final")] for weight in ({}, {"weight": 0})
    ]
    plain, weighed = (encoder.examples({"messages": chat})[0] for chat in chats)
    assert plain.input_ids.tolist() == weighed.input_ids.tolist()


@pytest.mark.parametrize("weight", [0.5, 2, -1, "0", [], {}])
def test_other_weights_are_refused(weight: object) -> None:
    with pytest.raises(RecordError, match="weight of message 2 must be 0 or 1, got"):
        targets(user(), assistant("a", weight=weight))


def test_a_weight_belongs_to_an_assistant_turn() -> None:
    assert targets(user(weight=0), assistant("a")) == "a<|im_end|>"
    with pytest.raises(RecordError, match="message 1 has weight 1 and role 'user': only an assistant can be"):
        targets(user(weight=1), assistant("a"))


def test_a_chat_of_weights_0_has_no_target() -> None:
    with pytest.raises(RecordError, match="no target: the chat has no assistant turn, or none of weight 1"):
        targets(user(), assistant("a", weight=0))


@pytest.mark.parametrize("key", ["train", "loss_mask", "loss_weight", "is_target", "labels", "ignored"])
@pytest.mark.parametrize("turn", [1, 2])
def test_a_key_that_may_change_the_targets_is_refused(key: str, turn: int) -> None:
    chat = [user(), assistant("a")]
    chat[turn - 1][key] = "x"
    with pytest.raises(RecordError, match=f"{key} of message {turn} (must be 0 or 1, got 'x'|is not understood)"):
        targets(*chat)


@pytest.mark.parametrize("key", ["reasoning_content", "name", "timestamp", "id"])
def test_a_key_that_changes_nothing_is_ignored_with_one_notice(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = Encoder(make_tokenizer(chat=True), prompt_loss=False)
    for _ in range(2):
        encoder.examples({"messages": [user(), assistant("a", **{key: "something"})]})
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert key in said[0]


def test_keys_that_the_template_uses_are_passed_to_it() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    seen = targets(user(name="bob"), assistant("3", reasoning_content="one and two", tool_calls=[call]),
                   template=QWEN_LIKE)  # fmt: skip
    assert seen.startswith("<think>one and two</think>3<tool_call>")
    assert '"add"' in seen
    everything = targets(user(name="bob"), assistant("3"), template=QWEN_LIKE, prompt_loss=True)
    assert "user bob" in everything
    with pytest.raises(RecordError, match="drops tool calls"):
        targets(user(), assistant("3", tool_calls=[call]))


def test_keys_without_a_value_are_those_of_other_turns() -> None:
    """A Parquet file gives every turn the keys that any turn has."""
    assert targets(user(name=None, weight=None), assistant("a", name=None)) == "a<|im_end|>"


def test_a_turn_that_the_template_drops_is_refused() -> None:
    system, developer = ({"role": role, "content": text} for role, text in (("system", "x"), ("developer", "hi")))
    chat: list[dict[str, object]] = [{**system}, {**developer}, user("hi"), assistant("a")]
    with pytest.raises(RecordError, match="the chat template drops message 2, of role 'developer'"):
        targets(*chat, template=QWEN_LIKE)  # its content stands elsewhere, so that looking for it would not do
    assert targets(*chat) == "a<|im_end|>"
    assert targets({"role": "developer", "content": " "}, user(), assistant("a"), template=QWEN_LIKE) == "a<|im_end|>"


def test_a_template_that_keeps_the_header_alone_drops_the_turn() -> None:
    header = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(RecordError, match="drops message 2, of role 'tool'"):
        targets(user(), {"role": "tool", "content": "3"}, assistant("a"), template=header)


def test_chats_are_counted_and_counts_merge() -> None:
    """A worker's notices are merged into the parent's, which tells each line once."""
    two = [user("add"), assistant("three"), user("more"), assistant("seven")]
    told: list[str] = []
    each = Encoder(make_tokenizer(chat=True), prompt_loss=False, turns="each", report=told.append)
    whole = Encoder(make_tokenizer(chat=True), prompt_loss=False, report=told.append)
    for encoder in (each, whole):
        encoder.examples({"messages": two, "id": 7})
        encoder.examples({"prompt": "a", "response": "b"})
    assert told == ["column 'id' is not used"] * 2
    whole.notices.merge(each.notices, told.append)
    assert len(told) == 2
    assert whole.notices.chats() == "chats of several turns: 1 whole, 1 cut into 2 examples of a turn each"
    assert whole.notices.records == {"prompt and response": 2, "chats, whole": 1, "chats, one example per turn": 1}


def test_the_last_answer_of_several_is_counted_as_such() -> None:
    encoder = Encoder(make_tokenizer(chat=True), prompt_loss=False, turns="last")
    encoder.examples({"messages": [user("add"), assistant("three"), user("more"), assistant("seven")]})
    assert encoder.notices.chats().endswith("1 cut to the last answer")


@pytest.mark.parametrize("answer", ["yes", "yes<turn_end>", "yes<turn_end>\n"])
def test_an_answer_that_has_its_end_of_turn_gets_no_other(answer: str) -> None:
    """Gemma's end of turn is not its end token."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.add_tokens(["<turn_end>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}<turn_end>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (encoded,) = Encoder(tokenizer, prompt_loss=False).examples({"messages": [user(), assistant(answer)]})
    assert tokenizer.decode(encoded.input_ids[1:][encoded.target_mask[:-1]]) == "yes<turn_end>"


NOTICES = {
    "the chat template writes no end of turn after an answer: students learn no place to stop": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "the chat template renders an answer without 'Sure, ', the end of its generation prompt: labels begin before it": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\nSure, {% endif %}"
    ),
}


@pytest.mark.parametrize("notice", NOTICES)
def test_what_a_template_lacks_is_told_once(notice: str) -> None:
    tokenizer, told = make_tokenizer(chat=True), list[str]()
    encoder = Encoder(tokenizer, prompt_loss=False, report=told.append)
    chat = [user(), assistant("yes"), user("again"), assistant("no")]
    encoder.examples({"messages": chat})
    assert told == [], "ChatML has both"
    tokenizer.chat_template = NOTICES[notice]
    encoded = [example for _ in range(2) for example in encoder.examples({"messages": chat})]
    assert told == [notice]
    text = tokenizer.decode(encoded[0].input_ids[1:][encoded[0].target_mask[:-1]])
    assert text.startswith("yes"), "labels begin where the answer does"
