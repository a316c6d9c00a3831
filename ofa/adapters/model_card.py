"""Write the model card of an adapter folder: base and task, training data, scores, usage."""

from __future__ import annotations

from collections.abc import Mapping

from ofa.adapters.folder import BASE_CONFIG, KINDS, NORMS
from ofa.files import Json
from ofa.hub import is_hub_id

HERE = "PATH_OF_THIS_FOLDER"
PAPER = "2505.19107"

_QUANTIZED = """\
It was tuned and scored on a 4-bit (Q4_1) copy of that base, which `ofa` fetches by default and `ofa predict` uses
again; on the original weights the scores may differ.
"""
_PROTOCOL = """\
Accuracy of the most probable label word after the prompt, without demonstrations in it.
"""
_PROTOCOL_OF_HEADS = """\
Accuracy of the most probable label by the head, which reads the text without the rest of the template.
"""
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}
"""The hub's name of the pipeline for each of PEFT's task types."""

_MEASURES = {"accuracy": ("accuracy", "accuracy"), "macro_f1": ("f1", "macro-F1"), "exact_match": ("exact_match",) * 2}
"""Our scores that hubs list: the hub's id of the metric, and its name."""


def model_card(details: Json, task_type: str | None, kind: str = NORMS) -> str:
    """The card as Markdown, with the front matter that model hubs read.

    Args:
        details: the content of `ofa_config.json`.
        task_type: PEFT's task type: `CAUSAL_LM`, `SEQ_CLS` for an encoder with its head, or None.
        kind: PEFT's type of the adapter.
    """
    task = details.get("task") or {}
    parts = [
        f"---\n{_front_matter(details, task, task_type, kind)}\n---\n",
        f"# {_title(task, kind)}\n",
        _what(details, task_type, kind),
        _QUANTIZED if details.get("base_source") == "embedded" else "",
        _made_from(details, task, kind),
        _scores(details, _PROTOCOL_OF_HEADS if task_type == "SEQ_CLS" else _PROTOCOL),
        _usage(task_type, details["base_model"]),
        "Made with " + ", ".join(f"{name} {version}" for name, version in details["versions"].items()) + ".\n",
    ]
    return "\n".join(part for part in parts if part)


def _named(base: str | None) -> str:
    """The base model's name in the text."""
    return f"`{base}`" if base else "an unnamed model"


def _usage(task_type: str | None, base: str | None) -> str:
    """The section on use."""
    if base is not None and base.lower().endswith(".gguf"):
        load = _load_gguf(base)
    elif task_type == "CAUSAL_LM":
        load = (
            f'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("{HERE}")'
        )
    elif task_type == "SEQ_CLS":
        load = _load_head(base)
    else:
        load = f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, "{HERE}")'
    return (
        f"## Use\n\n```python\n{load}\n```\n\nor, with the task's template and label words applied:\n\n"
        f'```bash\nofa predict {HERE} --text "..."\n```\n'
    )


def _load_head(base: str | None) -> str:
    """Python that opens an encoder with the head in its adapter, by transformers alone."""
    return (
        "from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline\n\n"
        f'config = AutoConfig.from_pretrained("{HERE}/{BASE_CONFIG}")  # with the labels\n'
        f'model = AutoModelForSequenceClassification.from_pretrained("{HERE}", config=config)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n'
        'classify = pipeline("text-classification", model=model, tokenizer=tokenizer)'
    )


def _load_gguf(base: str) -> str:
    """Python that loads a GGUF base; without `dequantize`, some versions of transformers leave the weights packed."""
    folder, _, name = base.rpartition("/")
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, GgufConfig\n\n"
        "base_model = AutoModelForCausalLM.from_pretrained(\n"
        f'    "{folder or "."}", gguf_file="{name}", quantization_config=GgufConfig(dequantize=True)\n'
        f')\nmodel = PeftModel.from_pretrained(base_model, "{HERE}")'
    )


def _what(details: Json, task_type: str | None, kind: str) -> str:
    rest = "and a classification head" if task_type == "SEQ_CLS" else "and nothing else"
    count, base = f"{details['parameters']:,}", _named(details["base_model"])
    if kind == NORMS:
        return (
            f"{count} tuned norm scales of {base}, {rest}: a PEFT LN-tuning adapter made with `ofa` "
            f"(Optimization-inspired Few-shot Adaptation, arXiv {PAPER}).\n"
        )
    scales = f", {details['norm_scales']:,} of which are tuned norm scales," if "norm_scales" in details else ""
    return f"A PEFT {KINDS[kind]} adapter of {count} parameters{scales} for {base}, made with `ofa`.\n"


def _title(task: Mapping[str, object], kind: str) -> str:
    what = "Norm scales" if kind == NORMS else f"{KINDS[kind]} adapter"
    return f"{what} for {task.get('name', 'a task')}"


def _front_matter(details: Json, task: Mapping[str, object], task_type: str | None, kind: str) -> str:
    from huggingface_hub import ModelCardData

    base = details["base_model"]
    is_known = base is not None and is_hub_id(base)
    data = details.get("data") or {}
    card = ModelCardData(
        library_name="peft",
        pipeline_tag=_PIPELINES.get(task_type or ""),
        tags=["few-shot", KINDS[kind].lower(), "ofa", *([f"arxiv:{PAPER}"] if kind == NORMS else [])],
        # Hubs look up the base model, so a local folder is named only in the text.
        base_model=base if is_known else None,
        base_model_relation="adapter" if is_known else None,
        datasets=list(dict.fromkeys(one["hub_id"] for one in data.values() if "hub_id" in one)) or None,
        model_name=_title(task, kind),
        eval_results=_eval_results(details, task) or None,
    )
    return card.to_yaml(line_break="\n")


def _eval_results(details: Json, task: Mapping[str, object]) -> list[object]:
    from huggingface_hub import EvalResult

    scores, tested = details.get("scores") or {}, (details.get("data") or {}).get("test")
    if not (task and tested):
        return []
    return [
        EvalResult(
            task_type="text-classification" if task["labels"] else "text-generation",
            dataset_type=tested.get("hub_id", tested["name"]),
            dataset_name=tested["name"],
            dataset_split="test",
            metric_type=measure,
            metric_name=words,
            metric_value=round(scores[name], 4),
        )
        for name, (measure, words) in _MEASURES.items()
        if name in scores
    ]


def _made_from(details: Json, task: Json, kind: str) -> str:
    if not task:
        return ""
    settings = details.get("settings") or {}
    rows = {
        "data": _origin((details.get("data") or {}).get("train")),
        "template": f"`{task['template']!r}`",
        "labels": ", ".join(task["labels"]) or "none (free completion)",
        "shots": details.get("shots"),
        "examples used": _used(details),
        "seed": details.get("seed"),
        "method": details.get("method"),
        "step ratio, sharpness": _weights(settings) if kind == NORMS or "norm_scales" in details else None,
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None)
    return f"## Made from\n\n| | |\n|---|---|\n{table}\n"


def _weights(settings: Mapping[str, object]) -> str | None:
    if not settings:
        return None
    weights = (settings[name] for name in ("step_ratio", "sharpness"))
    return ", ".join(weight if isinstance(weight, str) else f"{weight:g}" for weight in weights)


def _used(details: Json) -> str | None:
    if not {"indices", "examples"} <= set(details):
        return None
    return f"{len(details['indices']):,} of {details['examples']:,}"


def _scores(details: Json, protocol: str) -> str:
    scores = details.get("scores") or {}
    numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
    if not numbers:
        return ""
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in numbers.items())
    tested = _origin((details.get("data") or {}).get("test"))
    examples = f"{scores['count']:,} examples" if "count" in scores else "examples"
    where = f"On {examples} of {_cell(tested)}.\n" if tested else ""
    if "unused" in scores:
        where = f"On {examples} of the {scores['unused']:,} training examples that were not used.\n"
    protocol = protocol if "accuracy" in numbers else ""
    return f"## Scores\n\n{where}{protocol}\n| measure | value |\n|---|---|\n{rows}\n"


def _origin(data: Mapping[str, str] | None) -> str | None:
    if data is None:
        return None
    if "hub_id" not in data:
        return f"`{data['name']}`, {data['origin']}"
    return f"`{data['name']}`, [{data['hub_id']}](https://huggingface.co/datasets/{data['hub_id']})"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")
