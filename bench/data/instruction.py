"""Instructions and responses: a model is trained and scored on the responses alone.

A row is a prompt and a response, or a chat that the tokeniser's own template writes out. It becomes one sequence: its
tokens, then the end of the text again and again up to ``length``. A response is scored with what ends it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bench.config import IGNORED
from bench.data.overlap import shared_passages
from bench.data.rows import RowOptions, Rows
from bench.data.task import Sample, Task, TaskData, Tokens, make_data, register, token_kind
from bench.data.text import bits_per_byte, distinct_splits
from bench.data.text_files import SHARES
from bench.data.tokenizers import TextTokenizer, text_tokenizer
from bench.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\b")  # what a template marks the responses with, if it does
KEYS = ("role", "content")  # of a message
CHAT = "a list of messages with role and content, both text"


class Example(NamedTuple):
    """A row. asked: all that is not scored, as text; responses: all that is; number: of the row."""

    number: int
    asked: str
    responses: str
    messages: list[dict[str, Any]] | None = None


class Coded(NamedTuple):
    """A row's tokens [T + 1], and which of them are of a response."""

    tokens: Tokens
    scored: np.ndarray[Any, np.dtype[np.bool_]]


@register("instruction")
class Instruction(Task):
    """Prompts and responses, or chats, from any data set known to ``datasets``; the responses alone are scored."""

    class Options(RowOptions):
        """Which data set is read. A split that it lacks is cut off the end of its train split.

        Rows that lack something (null), and those of more than ``length`` + 1 tokens, are left out and counted. What is
        not text is refused.

        Attributes:
            prompt_column, response_column: what is given, and what is to follow, end of the text included.
            messages_column: chats instead, each a list of ``{"role": ..., "content": ...}``. The tokeniser's chat
                template writes them out; all that an ``assistant`` says is a response.
        """

        prompt_column: str = "prompt"
        response_column: str = "response"
        messages_column: str | None = None

    def build(self) -> TaskData:
        options, rows = self.options, Rows(self.name, self.options)
        examples = {name: list(self._examples(rows, name, split)) for name, split in rows.splits().items()}
        for name in ("test", "valid"):
            if name not in examples:
                cut = max(1, int(len(examples["train"]) * SHARES[name]))
                examples[name], examples["train"] = examples["train"][-cut:], examples["train"][:-cut]
        tokenizer = text_tokenizer(
            options.tokenizer, options.bpe_vocab_size, (f"{one.asked}{one.responses}" for one in examples["train"])
        )
        code, end = _coder(options, tokenizer, rows)
        splits, per_token, kind = dict[str, Sample](), dict[str, float](), token_kind(tokenizer.vocab_size)
        for name, given in examples.items():
            coded = [(one, code(name, one)) for one in given]
            fitting = [(one, found) for one, found in coded if len(found.tokens) <= options.length + 1]
            rows.leave_out(name, f"more than {options.length} + 1 tokens (options.length)", len(coded) - len(fitting))
            if not fitting:
                told = "; ".join(rows.notes()) or "it has none"
                raise UserError(f"{rows.where}.dataset: no row of split {name!r} can be used: {told}")
            splits[name] = _padded([found for _, found in fitting], options.length, end, kind)
            scored = sum(int(found.scored[1:].sum()) for _, found in fitting)
            per_token[name] = sum(len(one.responses.encode()) for one, _ in fitting) / scored
        splits, dropped = distinct_splits(splits, options, None)
        # A sign of the split's own behind each response: several short ones in a row are no passage.
        signed = ((name, chr(at), given) for at, (name, given) in enumerate(examples.items(), 1))
        responses = {name: [one.responses + sign for one in given] for name, sign, given in signed}
        sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in responses.items()}
        notes = [*rows.notes(), *dropped, *_shared_prompts(examples), *shared_passages(responses, sizes)]
        metric = bits_per_byte(splits, tokenizer.vocab_size, per_token, None)
        return make_data(splits, tokenizer.vocab_size, metric, per_token, tokenizer.made, notes)

    def _examples(self, rows: Rows, name: str, split: Any) -> Iterator[Example]:
        if self.options.messages_column is not None:
            yield from self._chats(rows, name, split, self.options.messages_column)
            return
        columns = {"prompt_column": self.options.prompt_column, "response_column": self.options.response_column}
        for first, table in rows.read(name, split, columns):
            texts = [rows.texts(name, first, column, table[column]).to_pylist() for column in columns.values()]
            for number, (prompt, response) in enumerate(zip(*texts, strict=True), first):
                if prompt == "":
                    rows.leave_out(name, "an empty prompt")  # nothing that could foretell the response's first token
                elif prompt is not None and response is not None:
                    yield Example(number, prompt, response)

    def _chats(self, rows: Rows, name: str, split: Any, column: str) -> Iterator[Example]:
        for first, table in rows.read(name, split, {"messages_column": column}):
            for number, chat in enumerate(table[column].to_pylist(), first):
                if chat is None:
                    rows.leave_out(name, f"no messages in column {column!r}")
                    continue
                if wrong := _wrong(chat):
                    raise rows.refused(name, number, column, wrong[0], CHAT)
                said = [message for message in chat if message["role"] == "assistant"]
                if any(message[key] is None for message in chat for key in KEYS):
                    rows.leave_out(name, f"a message without role or content in column {column!r}")
                elif not said or said[0] is chat[0]:
                    rows.leave_out(name, f"no answer of an assistant in column {column!r}")
                else:
                    asked = "".join(message["content"] for message in chat if message["role"] != "assistant")
                    given = [{key: value for key, value in message.items() if value is not None} for message in chat]
                    yield Example(number, asked, "".join(message["content"] for message in said), given)


def _wrong(chat: Any) -> list[Any]:
    """What of a chat is not what it must be."""
    if not isinstance(chat, list):
        return [chat]
    return [
        message
        for message in chat
        if not isinstance(message, dict) or any(not isinstance(message.setdefault(key), str | None) for key in KEYS)
    ]


def _coder(
    options: Instruction.Options, tokenizer: TextTokenizer, rows: Rows
) -> tuple[Callable[[str, Example], Coded], int]:
    """What makes the tokens of a split's row, and the token behind them. Raises UserError if the tokeniser cannot."""
    model = tokenizer.made()
    end = model.eos_token_id
    if end is None:
        raise UserError(f"{rows.where}.tokenizer: {options.tokenizer!r} has no token for the end of a text")
    if options.messages_column is None:

        def plain(name: str, one: Example) -> Coded:
            asked, response = tokenizer.encode([one.asked, one.responses])
            scored = np.arange(len(asked) + len(response) + 1) >= len(asked)
            return Coded(np.concatenate([asked, response, [end]]), scored)

        return plain, end
    if not model.chat_template:
        raise UserError(
            f"{rows.where}.tokenizer: {options.tokenizer!r} has no chat template, which messages_column needs "
            "(allowed: 'pretrained:NAME_OR_FOLDER' of a chat model)"
        )
    if not model.is_fast:
        raise UserError(f"{rows.where}.tokenizer: {options.tokenizer!r} does not tell where its tokens stand in a text")

    def chat(name: str, one: Example) -> Coded:
        assert one.messages is not None and options.messages_column is not None
        try:
            return _chat(model, one.messages)
        except Exception as error:  # whatever the template raises
            allowed = f"what the tokeniser's chat template takes: {first_line(error)}"
            raise rows.refused(name, one.number, options.messages_column, one.messages, allowed) from None

    return chat, end


def _chat(model: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> Coded:
    """A chat as the template writes it. What an assistant says is what the template marks as such, else what it writes
    behind the words that begin an answer.
    """
    if GENERATION.search(str(model.chat_template)):
        found: Any = model.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Coded(np.asarray(found["input_ids"]), np.asarray(found["assistant_masks"], bool))

    def written(count: int, begun: bool = False) -> str:
        text = model.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=begun)
        assert isinstance(text, str)
        return text

    whole, spans = written(len(messages)), list[tuple[int, int]]()
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = written(place, begun=True), written(place + 1)
            if not after.startswith(before) or not whole.startswith(after):
                raise ValueError("it writes a message in another way where others follow")
            spans.append((len(before), len(after)))
    found = model(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    scored = [any(start <= at < stop for start, stop in spans) for at, _ in found["offset_mapping"]]
    return Coded(np.asarray(found["input_ids"]), np.asarray(scored))


def _padded(coded: Sequence[Coded], length: int, end: int, kind: Any) -> Sample:
    """Rows of up to ``length`` + 1 tokens as inputs and targets."""
    ids, targets = np.full((len(coded), length), end, kind), np.full((len(coded), length), IGNORED, kind)
    for row, one in enumerate(coded):
        n = len(one.tokens) - 1
        ids[row, :n] = one.tokens[:-1]
        targets[row, :n] = np.where(one.scored[1:], one.tokens[1:], IGNORED)
    return Sample(ids, targets)


def _shared_prompts(examples: dict[str, list[Example]]) -> Iterator[str]:
    """How many prompts stand in two splits, in words."""
    asked = {name: [one.asked for one in given] for name, given in examples.items()}
    for name, other in (("test", "train"), ("valid", "train"), ("test", "valid")):
        seen = set(asked[other])
        if count := sum(text in seen for text in asked[name]):
            yield f"{count:,} of {len(asked[name]):,} prompts in {name} stand in {other} too"
