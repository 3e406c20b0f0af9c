"""Conversations: records, the templates to the letter, and which tokens are responses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_engine.data.conversations import TEMPLATES, Chat, chat_of, messages_of
from ep_engine.data.corpus import load_tokenizer, train_tokenizer
from ep_engine.data.documents import Block
from ep_engine.data.encoder import Encoder, response_mask
from ep_engine.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four"},
]
SYSTEM = {"role": "system", "content": "be kind"}


def parts(template: str, messages: list[dict[str, str]]) -> tuple[str, list[str]]:
    text, spans = Chat(template, SPECIAL).with_responses(messages)
    return text, [text[begin:end] for begin, end in spans]


def test_templates_to_the_letter() -> None:
    polite = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    text, responses = parts(TEMPLATES["default"], TURNS)
    assert text == f"{polite}\nHuman: one?\nAssistant: two</s>\nHuman: three?\nAssistant: four</s>"
    assert responses == ["two</s>", "four</s>"]
    assert parts(TEMPLATES["default"], [SYSTEM, *TURNS[:2]])[0] == "be kind\nHuman: one?\nAssistant: two</s>"

    text, responses = parts(TEMPLATES["vicuna"], TURNS)
    assert text == " USER: one? ASSISTANT: two</s>USER: three? ASSISTANT: four</s>"
    assert responses == ["two</s>", "four</s>"]
    assert parts(TEMPLATES["vicuna"], [SYSTEM, *TURNS[:2]])[0] == "be kind USER: one? ASSISTANT: two</s>"

    text, responses = parts(TEMPLATES["deepseek"], TURNS[:2])
    assert text == (
        "You are an AI assistant, developed by DeepSeek Company. For politically sensitive questions, security and "
        "privacy issues, you will refuse to answer.\n### Instruction:\none?\n### Response:\ntwo\n<|EOT|>"
    )
    assert responses == ["two\n<|EOT|>"]


def test_a_tokenizers_own_template_needs_no_code() -> None:
    text, responses = parts(CHATML, TURNS)
    assert text.startswith("<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user")
    assert responses == ["two<|im_end|>\n", "four<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "drops the response"),
        ("{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}", "tells earlier turns otherwise"),
        ("{{ raise_exception('no such turn') }}", r"the template refuses it \(no such turn\)"),
        ("{% for", "the template refuses it"),
    ],
)
def test_templates_that_lose_responses_are_named(template: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parts(template, TURNS)


RECORDS: list[tuple[str, Any, list[str]]] = [
    ("alpaca", {"instruction": "add", "input": "1 2", "output": "3"}, ["add\n1 2", "3"]),
    ("alpaca", {"instruction": "add", "input": "", "output": "3"}, ["add", "3"]),
    ("alpaca", {"instruction": "c", "output": "d", "history": [["a", "b"]]}, ["a", "b", "c", "d"]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a", "b"]),
    ("sharegpt", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ["a", "b"]),
    ("sharegpt", {"conversations": ["a", "b"]}, ["a", "b"]),
    ("sharegpt", {"conversations": [{"from": f, "value": f} for f in ("gpt", "human", "gpt")]}, ["human", "gpt"]),
    ("sharegpt", {"conversations": ["a", "b", "c"]}, ["a", "b"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "record", "expected"), RECORDS)
def test_records_become_turns(kind: Any, record: Any, expected: list[str]) -> None:
    messages = messages_of(record, kind)
    assert [message["content"] for message in messages] == expected
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(expected) // 2)


def test_a_system_text_comes_first() -> None:
    for key in ("system", "system_prompt"):
        assert messages_of({"conversations": ["a", "b"], key: "s"}, "sharegpt")[0] == {"role": "system", "content": "s"}
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert [message["content"] for message in messages_of({"conversations": turns}, "sharegpt")] == ["s", "a", "b"]


@pytest.mark.parametrize(
    ("kind", "record", "sentence"),
    [
        ("alpaca", [], "no JSON object"),
        ("alpaca", {"instruction": "a"}, "no text under instruction and output"),
        ("alpaca", {"instruction": "a", "output": " "}, "an empty response"),
        ("sharegpt", {"text": "a"}, "no list under conversations or messages"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "no question that a response follows"),
        ("sharegpt", {"conversations": [{"from": "who", "value": "a"}]}, "a turn of 'who'"),
        ("sharegpt", {"conversations": [1, 2]}, "a turn that is no JSON object"),
        ("sharegpt", {"messages": [{"role": r, "content": r} for r in ("user", "user", "assistant")]}, "not alternate"),
    ],
)
def test_records_that_lack_something_say_what(kind: Any, record: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        messages_of(record, kind)


def test_mask_by_hand() -> None:
    # "A: yes</s>" in tokens "A", ":", " yes", "</s>"; the answer is yes</s>
    assert response_mask([(0, 1), (1, 2), (2, 6), (6, 10)], [(3, 10)]).tolist() == [0, 0, 1, 1]
    # the same with white space trimmed off, and a token of nothing else behind the answer
    assert response_mask([(0, 1), (1, 2), (3, 6), (7, 7)], [(3, 7)]).tolist() == [0, 0, 1, 1]
    assert response_mask([], [(0, 1)]).tolist() == []


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    train_tokenizer(["Human: one?\nAssistant: two three four"] * 9, 300, folder)
    return folder


@given(answers=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=3), question=st.text(min_size=1))
def test_masked_tokens_are_the_responses(tokenizer: Path, answers: list[str], question: str) -> None:
    fast = load_tokenizer(tokenizer)
    chat = chat_of("default", None, {"eos_token": "<|endoftext|>"}, "")
    record = {"conversations": [text for answer in answers for text in (question, answer)]}
    encode = Encoder(fast.backend_tokenizer.to_str(), "sharegpt", bos=None, eos=0, chat=chat)

    encoded = encode(Block(Path("a.jsonl"), 1, [record], 9, is_json=True))

    assert encoded.mask_N is not None
    text, spans = chat.with_responses(messages_of(record, "sharegpt"))
    assert fast.decode(encoded.ids_N) == text
    learnt = np.flatnonzero(encoded.mask_N)
    # of every response all bytes, and of what is before it no more than a space that its first token begins with
    runs = np.split(learnt, np.flatnonzero(np.diff(learnt) > 1) + 1)
    assert [fast.decode(encoded.ids_N[run]).lstrip(" ") for run in runs] == [text[a:b].lstrip(" ") for a, b in spans]


def test_templates_are_found_or_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("x")
    assert chat_of(None, "own", SPECIAL, "folder") == Chat("own", SPECIAL)
    assert chat_of(str(tmp_path / "t.jinja"), "own", SPECIAL, "folder").template == "x"
    with pytest.raises(UserError, match=r"tokenizer folder has no chat template; name one with --template: default, v"):
        chat_of(None, None, SPECIAL, "folder")
    with pytest.raises(
        UserError, match=r"--template alpca is none of default, vicuna, deepseek and no file; choose one"
    ):
        chat_of("alpca", None, SPECIAL, "folder")
