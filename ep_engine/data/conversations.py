"""Conversations: records of instructions as messages, messages as text, and which characters of it are responses.

Templates are Jinja, as Hugging Face tokenizers carry them, so the named ones go the same way as a tokenizer's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ep_engine.errors import UserError

Format = Literal["text", "alpaca", "sharegpt"]
Message = dict[str, str]  # role (system, user or assistant), content

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_POLITE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
_DEEPSEEK = (
    "You are an AI assistant, developed by DeepSeek Company. For politically sensitive questions, security and privacy "
    "issues, you will refuse to answer."
)


def _template(system: str, after_system: str, user: str, prompt: str, answer: str, *, between: str = "") -> str:
    """A template of turns; `user` stands before a question, `prompt` behind it, `answer` behind a response."""
    return (
        "{% set first = messages[0].role == 'system' %}"
        f"{{{{ messages[0].content if first else {system!r} }}}}{{{{ {after_system!r} }}}}"
        "{% for m in messages[(1 if first else 0):] %}{% if m.role == 'user' %}"
        f"{{{{ '' if loop.first else {between!r} }}}}{{{{ {user!r} + m.content.strip() + {prompt!r} }}}}"
        f"{{% else %}}{{{{ {answer} }}}}{{% endif %}}{{% endfor %}}"
    )


# What a response begins with belongs to its first token: an answer that LLaMA's tokenizer encodes alone begins so too.
TEMPLATES = {
    "default": _template(
        _POLITE, "\n", "Human: ", "\nAssistant:", "' ' + m.content.strip() + eos_token", between="\n"
    ),  # LLaMA-Factory's, which MoLlama was tuned with
    "vicuna": _template("", " ", "USER: ", " ASSISTANT:", "' ' + m.content.strip() + eos_token"),  # LLaMA-MoE's
    "deepseek": _template(
        _DEEPSEEK, "\n", "### Instruction:\n", "\n### Response:\n", "m.content.strip() + '\n<|EOT|>'", between="\n"
    ),  # DeepSeekMoE's, which C2R tuned Qwen1.5-MoE with
}


@dataclass(frozen=True)
class Chat:
    """How messages become text."""

    template: str  # Jinja
    special_tokens: Mapping[str, str]  # that it may name: bos_token, eos_token, ...

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The messages as text; `prompt`: with what stands before a response that is still to come.

        Raises:
            ValueError: the template refuses them, or is none.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template  # slow to import

        names: dict[str, Any] = {**self.special_tokens, "add_generation_prompt": prompt}
        rendered: Any  # declared as one string
        try:
            rendered = render_jinja_template([list(messages)], chat_template=self.template, **names)
        except TemplateError as error:
            raise ValueError(f"the template refuses it ({error})") from None
        text: str = rendered[0][0]
        return text

    def with_responses(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and the characters [begin, end) of every response with what ends it.

        Raises:
            ValueError: the template drops a response, or tells earlier turns otherwise once others follow.
        """
        text, spans = self.text(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, until = self.text(messages[:i], prompt=True), self.text(messages[: i + 1])
            if not (text.startswith(before) and text.startswith(until)):
                raise ValueError("the template tells earlier turns otherwise once others follow")
            begin = text.find(message["content"].strip(), len(before), len(until))
            if begin < 0:
                raise ValueError("the template drops the response")
            spans.append((begin, len(until)))
        return text, spans


def chat_of(template: str | None, own: str | None, special_tokens: Mapping[str, str], tokenizer: str) -> Chat:
    """The chat of a template: one of TEMPLATES, the Jinja of a file, or a tokenizer's own.

    Raises:
        UserError: none is named and the tokenizer has none, or the name is unknown.
    """
    from pathlib import Path

    if template is None:
        if own is None:
            raise UserError(
                f"tokenizer {tokenizer} has no chat template; name one with --template: {', '.join(TEMPLATES)} or a "
                ".jinja file"
            )
        return Chat(own, special_tokens)
    if template in TEMPLATES:
        return Chat(TEMPLATES[template], special_tokens)
    if not Path(template).is_file():
        raise UserError(f"--template {template} is none of {', '.join(TEMPLATES)} and no file; choose one")
    return Chat(Path(template).read_text(encoding="utf-8"), special_tokens)


def messages_of(record: Any, kind: Format) -> list[Message]:
    """The messages of a record, the last of which is a response.

    Args:
        record: alpaca: `instruction`, `output`, and perhaps `input`, `system`, `history` ([[question, answer], ...]).
            sharegpt: `conversations` or `messages`, of from and value, of role and content, or of texts in turn, and
            perhaps `system` or `system_prompt`. A first turn that is no question, and a last one, are left out.
        kind: alpaca or sharegpt.

    Raises:
        ValueError: says what it lacks.
    """
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    turns = _alpaca(record) if kind == "alpaca" else _sharegpt(record)
    system = record.get("system") or record.get("system_prompt")
    if turns and turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
    if turns and turns[0]["role"] == "assistant":
        turns.pop(0)
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        raise ValueError("no question that a response follows")
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        raise ValueError("questions and responses do not alternate")
    if not all(turn["content"].strip() for turn in turns[1::2]):
        raise ValueError("an empty response")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _alpaca(record: dict[str, Any]) -> list[Message]:
    question, answer = record.get("instruction"), record.get("output")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError("no text under instruction and output")
    if record.get("input"):
        question = f"{question}\n{record['input']}"
    return _in_turn([text for pair in record.get("history") or [] for text in pair] + [question, answer])


def _sharegpt(record: dict[str, Any]) -> list[Message]:
    turns = record.get("conversations") or record.get("messages")
    if not isinstance(turns, list):
        raise ValueError("no list under conversations or messages")
    if all(isinstance(turn, str) for turn in turns):  # LIMA's
        return _in_turn(turns)
    return [_turn(turn) for turn in turns]


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ValueError("a turn that is no JSON object")
    role = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    if role not in _ROLES or not isinstance(text, str):
        raise ValueError(f"a turn of {role!r}, or without text")
    return {"role": _ROLES[role], "content": text}


def _in_turn(texts: Sequence[Any]) -> list[Message]:
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a turn without text")
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
