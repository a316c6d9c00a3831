"""The wiring of the supported model families, as a table; `steps.find` checks each row it uses against the model.

Names of norms do not tell where they are: `post_attention_layernorm` comes before the MLP in Llama and after the
attention in Gemma 2, and OPT's `final_layer_norm` is inside the layer. So the table
defines what each module reads and writes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BranchRow:
    """One branch of a decoder layer; paths are relative to the layer.

    `norm` holds the scale γ that preconditions the branch. The branch starts at the input of `entry` and ends at the
    output of `exit`. `reads` is "normalized" (the branch reads the norm's output) or "stream"; `writes` is "update" or
    "stream" (`exit` adds the residual and normalizes the sum).
    """

    role: str
    norm: str
    entry: str
    exit: str
    reads: str = "normalized"
    writes: str = "update"
    residual_reader: str | None = None
    """A module inside the branch whose second argument is the residual stream (BERT adds it there)."""


@dataclass(frozen=True)
class Wiring:
    """How one layer adds its branches to the stream: `steps` in order, each a tuple of branches that run in parallel.

    `scale` names the layer's attribute that multiplies every branch; `adds_in_place` says that the layer overwrites
    a branch's output while it adds it up.
    """

    name: str
    steps: tuple[tuple[BranchRow, ...], ...]
    scale: str | None = None
    adds_in_place: bool = False


@dataclass(frozen=True)
class Family:
    """A row of the table: the model types it serves and the wirings they may have, most specific first.

    `layer_only` names the norm of the first branch for wirings without a module boundary between their sublayers.
    """

    model_types: tuple[str, ...]
    wirings: tuple[Wiring, ...]
    layer_only: str | None = None


def _sequential(attention: BranchRow, mlp: BranchRow, *, scale: str | None = None) -> Wiring:
    return Wiring("sequential", ((attention,), (mlp,)), scale)


def _parallel(attention: BranchRow, mlp: BranchRow, *, adds_in_place: bool = False) -> Wiring:
    return Wiring("parallel", ((attention, mlp),), adds_in_place=adds_in_place)


def _attention(norm: str, module: str, exit: str | None = None) -> BranchRow:
    return BranchRow("attention", norm, module, exit or module)


def _mlp(norm: str, module: str = "mlp", exit: str | None = None) -> BranchRow:
    return BranchRow("mlp", norm, module, exit or module)


_LLAMA_ATTENTION = _attention("input_layernorm", "self_attn")
_LLAMA_MLP = _mlp("post_attention_layernorm")

LLAMA = _sequential(_LLAMA_ATTENTION, _LLAMA_MLP)
GRANITE = _sequential(_LLAMA_ATTENTION, _LLAMA_MLP, scale="residual_multiplier")
GPT2 = _sequential(_attention("ln_1", "attn"), _mlp("ln_2"))
OPT = _sequential(_attention("self_attn_layer_norm", "self_attn"), _mlp("final_layer_norm", "fc1", "fc2"))
VIT = _sequential(_attention("layernorm_before", "attention"), _mlp("layernorm_after"))
MODERNBERT = _sequential(_attention("attn_norm", "attn"), _mlp("mlp_norm"))
GPT_NEOX_SEQUENTIAL = _sequential(_attention("input_layernorm", "attention"), _LLAMA_MLP)
FALCON_SEQUENTIAL = _sequential(_attention("input_layernorm", "self_attention"), _LLAMA_MLP)

ONE_NORM_PARALLEL = _parallel(_LLAMA_ATTENTION, _mlp("input_layernorm"))
GPTJ = _parallel(_attention("ln_1", "attn"), _mlp("ln_1"))
GPT_NEOX = _parallel(_attention("input_layernorm", "attention"), _LLAMA_MLP)
FALCON = _parallel(_attention("input_layernorm", "self_attention"), _mlp("input_layernorm"), adds_in_place=True)
FALCON_TWO_NORMS = _parallel(_attention("ln_attn", "self_attention"), _mlp("ln_mlp"), adds_in_place=True)

SANDWICH = Wiring(
    "sandwich",
    (
        (_attention("input_layernorm", "self_attn", "post_attention_layernorm"),),
        (_mlp("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),),
    ),
)
BRANCH_NORM = Wiring(
    "branch norm",
    (
        (BranchRow("attention", "post_attention_layernorm", "self_attn", "post_attention_layernorm", reads="stream"),),
        (BranchRow("mlp", "post_feedforward_layernorm", "mlp", "post_feedforward_layernorm", reads="stream"),),
    ),
)
POST_NORM = Wiring(
    "post norm",
    (
        (
            BranchRow(
                "attention", "attention.output.LayerNorm", "attention", "attention", reads="stream", writes="stream"
            ),
        ),
        (
            BranchRow(
                "mlp",
                "output.LayerNorm",
                "intermediate",
                "output",
                reads="stream",
                writes="stream",
                residual_reader="output",
            ),
        ),
    ),
)

FAMILIES = (
    Family(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3"), (LLAMA,)),
    Family(("mixtral", "qwen3_moe", "gpt_oss"), (LLAMA,)),
    Family(("granite",), (GRANITE,)),
    Family(("gemma2", "gemma3", "gemma3_text"), (SANDWICH,)),
    Family(("olmo2",), (BRANCH_NORM,)),
    Family(("phi", "cohere"), (ONE_NORM_PARALLEL,)),
    Family(("gpt2",), (GPT2,)),
    Family(("gptj",), (GPTJ,)),
    Family(("gpt_neox",), (GPT_NEOX, GPT_NEOX_SEQUENTIAL)),
    Family(("opt",), (OPT,), layer_only="self_attn_layer_norm"),
    Family(("falcon",), (FALCON_TWO_NORMS, FALCON, FALCON_SEQUENTIAL)),
    Family(("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"), (POST_NORM,)),
    Family(("vit",), (VIT,)),
    Family(("modernbert",), (MODERNBERT,)),
)
"""One row per family; a model type without a row is tried against every wiring, and the trial run decides."""


def candidates(model_type: str) -> tuple[Family, ...]:
    """Families to try for a model type: its own row, or every row when it has none."""
    own = tuple(family for family in FAMILIES if model_type in family.model_types)
    return own or FAMILIES
