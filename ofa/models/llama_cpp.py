"""Run a GGUF file in llama.cpp, with the interface that `Scorer` needs of a transformers model and its tokenizer.

The tokenizer is llama.cpp's own, so that its server reads the same tokens.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ofa.errors import InputError, first_sentence
from ofa.models.embedded import check_gguf
from ofa.models.load import LoadedModel

if TYPE_CHECKING:
    from gguf import GGUFReader
    from llama_cpp import Llama

_LONGEST_CONTEXT = 8192
"""Positions at most: memory for keys and values is taken for all of them at once."""
_TOKENS_AT_ONCE = 512


def load_llama_cpp(file: Path) -> LoadedModel:
    """The model and the tokenizer in a GGUF file, on PyTorch's number of threads.

    Raises:
        InputError: llama.cpp is not installed, or cannot read the file.
    """
    check_gguf(file)
    try:
        import llama_cpp
    except ImportError as error:
        raise InputError(
            "a GGUF file is run by llama.cpp, whose Python package is not installed; `pip install llama-cpp-python`"
        ) from error
    try:
        from gguf import GGUFReader

        reader = GGUFReader(file)
        architecture = reader.fields["general.architecture"].contents()
        window = min(int(reader.fields[f"{architecture}.context_length"].contents()), _LONGEST_CONTEXT)
        llama = llama_cpp.Llama(
            str(file),
            n_ctx=window,
            n_batch=_TOKENS_AT_ONCE,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            verbose=False,
        )
    except Exception as error:  # it says what went wrong on a stream of its own, which is closed
        raise InputError(
            f"llama.cpp cannot read {file} ({first_sentence(error)}); make the file with a llama.cpp of the "
            "installed version"
        ) from error
    # While Python still has what closing it calls.
    still = weakref.ref(llama)
    atexit.register(lambda: (one := still()) is not None and one.close())
    chat = reader.get_field("tokenizer.chat_template")
    template = None if chat is None else str(chat.contents())
    tokenizer = LlamaCppTokenizer(llama, added_tokens(reader), template)
    return LoadedModel(LlamaCppModel(llama, window), tokenizer, str(file), "gguf", file)


def added_tokens(reader: GGUFReader) -> dict[int, AddedToken]:
    """The tokens of a GGUF file's vocabulary that llama.cpp looks for before it splits a text."""
    from gguf.constants import TokenType

    fields = reader.fields
    types, words = fields["tokenizer.ggml.token_type"].contents(), fields["tokenizer.ggml.tokens"]
    looked_for = {TokenType.UNKNOWN: True, TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    return {
        number: AddedToken(words.contents(number), looked_for[kind])
        for number, kind in enumerate(types)
        if kind in looked_for
    }


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text as it is written; a special one is never part of what a user writes."""

    content: str
    special: bool


class LlamaCppModel(nn.Module):
    """Logits and greedy completions, one sequence at a time."""

    def __init__(self, llama: Llama, window: int) -> None:
        from transformers import PretrainedConfig

        super().__init__()
        self._llama = llama
        self.config = PretrainedConfig(max_position_embeddings=window, name_or_path=llama.model_path)
        # Says where inputs go.
        self.device_of_inputs = nn.Parameter(torch.empty(0), requires_grad=False)

    def get_input_embeddings(self) -> None:
        """None that PyTorch could read."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor) -> SimpleNamespace:
        """Logits (B, K, vocabulary) of a right-padded batch at the columns to keep; 0 in the padding."""
        logits = torch.zeros(len(input_ids), len(logits_to_keep), self._llama.n_vocab())
        for row, (ids, length) in enumerate(zip(input_ids, attention_mask.sum(1).tolist(), strict=True)):
            columns = [column for column in logits_to_keep.tolist() if column < length]
            logits[row, : len(columns)] = self._read(ids[:length].tolist(), 0, columns)
        return SimpleNamespace(logits=logits)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, pad_token_id: int, **_: object
    ) -> Tensor:
        """A left-padded batch with its greedy completions."""
        new = torch.full((len(input_ids), max_new_tokens), pad_token_id)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            found = self._greedy(ids[mask].tolist(), max_new_tokens)
            new[row, : len(found)] = torch.tensor(found, dtype=torch.long)
        return torch.cat([input_ids, new], dim=1)

    def _greedy(self, prompt: list[int], limit: int) -> list[int]:
        import llama_cpp

        vocabulary = llama_cpp.llama_model_get_vocab(self._llama.model)
        new: list[int] = []
        logits = self._read(prompt, 0, [len(prompt) - 1])
        while len(new) < limit:
            token = int(logits[0].argmax())
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
            new.append(token)
            logits = self._read([token], len(prompt) + len(new) - 1, [0])
        return new

    def _read(self, tokens: Sequence[int], start: int, wanted: Sequence[int]) -> Tensor:
        """Logits (K, vocabulary) at the wanted places of `tokens`, which stand `start` places after the beginning."""
        import llama_cpp

        context = self._llama.ctx
        if start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        found = []
        batch = llama_cpp.llama_batch_init(_TOKENS_AT_ONCE, 0, 1)
        try:
            for first in range(0, len(tokens), _TOKENS_AT_ONCE):
                part = tokens[first : first + _TOKENS_AT_ONCE]
                places = [place - first for place in wanted if first <= place < first + len(part)]
                batch.n_tokens = len(part)
                for index, token in enumerate(part):
                    batch.token[index], batch.pos[index] = token, start + first + index
                    batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                    batch.logits[index] = index in places
                if llama_cpp.llama_decode(context, batch):
                    raise InputError(f"llama.cpp could not compute {len(tokens)} tokens; give shorter texts")
                for place in places:
                    row = llama_cpp.llama_get_logits_ith(context, place)
                    found.append(torch.from_numpy(np.ctypeslib.as_array(row, (self._llama.n_vocab(),)).copy()))
        finally:
            llama_cpp.llama_batch_free(batch)
        return torch.stack(found)


@dataclass(frozen=True)
class LlamaCppTokenizer:
    """llama.cpp's tokenizer of a file."""

    llama: Llama
    added_tokens_decoder: dict[int, AddedToken]
    chat_template: str | None

    @property
    def eos_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.llama.token_eos())

    pad_token_id = eos_token_id

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        """Token ids of a text, with the tokens that begin one unless they are not wanted; control tokens are read."""
        return {"input_ids": self.llama.tokenize(text.encode(), add_bos=add_special_tokens, special=True)}

    def batch_decode(self, rows: Tensor, **_: object) -> list[str]:
        """Texts of rows of ids, without control tokens."""
        return [self.llama.detokenize(row).decode("utf-8", "replace") for row in rows.tolist()]
