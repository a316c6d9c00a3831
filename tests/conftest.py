"""Shared fixtures: a tiny Llama with random weights and a tiny byte-level BPE tokenizer, saved as a local folder."""

from __future__ import annotations

import gc
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.device import DEVICE
from tests.interpreter import wrap_language_once_per_launch

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Kernels run on CPU tensors. Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SENTENCES = (
    "Review: a warm and funny film that never drags\nSentiment: positive",
    "Review: dull, slow and far too long\nSentiment: negative",
    "Question: who wrote the first novel about the sea?\nAnswer Type: Person",
    "Question: how many islands are there?\nAnswer Type: Number",
    "News: the team won the final after extra time\nType: Sports",
    "News: shares fell as the bank raised its rates\nType: Business",
    "The capital of France is Paris, and 12 + 7 is 19.",
)
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread: for tensors this small, a second thread costs ten times the arithmetic."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """The collector goes through what this module makes, and leaves out everything that was imported before."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extension modules complain of what is left when Python ends


@pytest.fixture(scope="session", autouse=True)
def _whole_float32() -> None:
    """Float32 convolutions on a GPU instead of the default TF32, which has 10 bits."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    """Kernels on CPU tensors take hundreds of seconds of the suite."""
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        wrap_language_once_per_launch()


def _save_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="right"
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama and its tokenizer. Shared by the whole session: read it, never write into it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    vocab_size = _save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh (model, tokenizer) of the tiny Llama: float32, eval mode, on the tests' device.

    Loaded each time: training a copy of a loaded model does not end at the same bits.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return model.eval().to(DEVICE), AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def tiny_gguf(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama's shapes and vocabulary as a GGUF file, with tied embeddings and the digit-splitting rule."""
    import gguf
    import numpy as np
    from transformers import AutoTokenizer, LlamaConfig

    config = LlamaConfig.from_pretrained(tiny_folder)
    file = tmp_path_factory.mktemp("tiny-gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_gguf_tokenizer(writer, AutoTokenizer.from_pretrained(tiny_folder))
    for name, shape in _gguf_shapes(config).items():
        values = np.random.default_rng(len(name)).normal(0.0, 0.05, shape)
        writer.add_tensor(name, (values + (len(shape) == 1)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_gguf_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in (BOS, EOS, PAD) else 1 for piece in pieces])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template("<s>{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}assistant:")


def _gguf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    width, inner = config.hidden_size, config.intermediate_size
    shared = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, width),
        "output_norm.weight": (width,),
    }
    for layer in range(config.num_hidden_layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (width,),
            f"blk.{layer}.attn_q.weight": (width, width),
            f"blk.{layer}.attn_k.weight": (shared, width),
            f"blk.{layer}.attn_v.weight": (shared, width),
            f"blk.{layer}.attn_output.weight": (width, width),
            f"blk.{layer}.ffn_norm.weight": (width,),
            f"blk.{layer}.ffn_gate.weight": (inner, width),
            f"blk.{layer}.ffn_up.weight": (inner, width),
            f"blk.{layer}.ffn_down.weight": (width, inner),
        }
    return shapes
