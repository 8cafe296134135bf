"""Generated text as it comes, every token with the number of cycles it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from bench.errors import UserError, first_line
from bench.exits.generation import EarlyExit
from bench.model.configuration import CycleOutput
from bench.pretrained.sources import load_tokenizer, our_model
from bench.store.versions import model_folder

Write = Callable[[str], object]
SMALL = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
DEFAULT_NEW = 64  # tokens
COLDEST = 1e-6  # temperature
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what an incomplete UTF-8 sequence decodes to


class Checkpoint:
    """A saved model and the tokeniser beside it; without one, text is token numbers with spaces between."""

    def __init__(self, source: str) -> None:
        """source: the folder of a model, or of a finished cell. Raises UserError if it holds no model."""
        folder = model_folder(Path(source))
        if not (folder / "config.json").is_file():
            raise UserError(f"checkpoint {source!r} is not a folder with a saved model, such as runs/ID/model")
        self.lm = our_model(folder, source)
        if torch.cuda.is_available():
            self.lm.to("cuda")  # type: ignore[arg-type]
        self.tokenizer: Any = load_tokenizer(str(folder))

    def encode(self, prompt: str) -> Tensor:
        """Token numbers [1, T]. Raises UserError for an empty prompt or one that the model does not know."""
        vocab = self.lm.config.vocab_size
        if self.tokenizer is not None:
            try:
                ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            except Exception as error:  # the library has no class of its own for a text that a vocabulary cannot write
                raise UserError(f"--prompt: {prompt!r} cannot be written in the tokens: {first_line(error)}") from None
        else:
            ids = [int(word) if word.isdecimal() else -1 for word in prompt.split()]
        if not ids or not all(token is not None and 0 <= token < vocab for token in ids):
            kind = "text of at least one token" if self.tokenizer is not None else "token numbers with spaces between"
            raise UserError(f"--prompt: {prompt!r} must be {kind} (allowed: 0 to {vocab - 1})")
        return torch.tensor([ids])

    def decode(self, ids: list[int]) -> str:
        """Text of token numbers."""
        return str(self.tokenizer.decode(ids)) if self.tokenizer is not None else " ".join(map(str, ids))

    def following(self, ids: list[int], before: list[int]) -> str:
        """Text of token numbers behind others, with the space that may be between them."""
        first, both = self.decode(before), self.decode([*before, *ids])
        return both[len(first) :] if both.startswith(first) else self.decode(ids)


class _Stream(BaseStreamer):
    """Writes tokens as whole characters, and behind them in small digits the cycles of each."""

    def __init__(self, checkpoint: Checkpoint, cycles: list[int], write: Write) -> None:
        self.checkpoint, self.cycles, self.write = checkpoint, cycles, write
        self.waiting: list[int] = []
        self.before: list[int] = []  # the last token that is written
        self.prompt = True

    def put(self, value: Tensor) -> None:
        """Called with the prompt [1, T], then with every token [1]."""
        if self.prompt:
            self.prompt = False
            self.write(self.checkpoint.decode(ids := value.flatten().tolist()))
            self.before = ids[-1:]
            return
        self.waiting += value.flatten().tolist()
        if not self.checkpoint.decode(self.waiting).endswith(UNFINISHED) or len(self.waiting) == 4:
            self._flush()

    def end(self) -> None:
        """Called after the last token."""
        self._flush()

    def _flush(self) -> None:
        if self.waiting:
            marks = ",".join(str(number).translate(SMALL) for number in self.cycles[-len(self.waiting) :])
            self.write(self.checkpoint.following(self.waiting, self.before) + marks)
            self.before, self.waiting = self.waiting[-1:], []


def stream(
    checkpoint: Checkpoint,
    prompt: str,
    exits: EarlyExit | None,
    write: Write,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    n_cycles: int | None = None,
) -> list[int]:
    """Generate behind a prompt, writing the text as it comes; the cycles of each new token.

    Args:
        max_new_tokens: None: 64, or as many as fit.
        temperature: 0 is greedy; else all tokens may come.
        n_cycles: another number than the model was built with.

    Raises:
        UserError: if the prompt and the new tokens exceed the positions the model has learned.
    """
    lm, ids = checkpoint.lm, checkpoint.encode(prompt).to(checkpoint.lm.device)
    limit = lm.config.max_position_embeddings
    room = limit - ids.shape[1] if lm.positions is not None else None  # rotary positions know no end
    if room is not None and room < 1:
        raise UserError(f"--prompt: {ids.shape[1]} tokens (allowed: at most {limit - 1}, one less than the positions)")
    wanted = max_new_tokens or min(DEFAULT_NEW, DEFAULT_NEW if room is None else room)
    if room is not None and wanted > room:
        raise UserError(
            f"--max-new-tokens: {wanted} behind a prompt of {ids.shape[1]} tokens exceed the model's {limit} positions "
            f"(allowed: at most {room})"
        )
    if 0 < temperature < COLDEST:  # logits over it would not be finite
        raise UserError(f"--temperature: {temperature:g} (allowed: 0, or from {COLDEST:g} on)")
    lm.check_cycles("--cycles", n_cycles)
    ends = lm.schedule_at(n_cycles).depths
    if exits is not None:
        exits.check(lm, n_cycles)  # before anything is written
    cycles: list[int] = []

    def note(_lm: Any, _inputs: Any, output: CycleOutput) -> None:
        assert output.exit_depth is not None
        cycles.append(ends.index(int(output.exit_depth[0])) + 1)

    lm.exits = exits
    hook = lm.register_forward_hook(note)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    try:
        lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=wanted,
            streamer=_Stream(checkpoint, cycles, write),
            n_cycles=n_cycles,
            pad_token_id=0,
            **sampling,
        )
    finally:
        hook.remove()
        lm.exits = None
    return cycles


def histogram(cycles: list[int]) -> Iterator[str]:
    """``2 cycles: 31 %`` for every number of cycles that occurs."""
    for number in sorted(set(cycles)):
        yield f"{number} cycle{'s' if number > 1 else ''}: {cycles.count(number) / len(cycles):.0%}"
