"""`ofa inspect`: show a model's anatomy as regularizers and adapters use it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from ofa.commands.console import notice, show_json, show_table
from ofa.commands.options import DtypeOption, JsonOption, OfflineOption, TrustOption, command
from ofa.files import Json
from ofa.models.types import CausalLM

if TYPE_CHECKING:
    from ofa.anatomy.steps import Anatomy, Step


@command
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, model folder or GGUF file; the embedded default without it.")
    ] = None,
    dtype: DtypeOption = "float32",
    offline: OfflineOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a model's layers, steps, norms and wiring, what would be tuned, and which estimators apply.

    Example: ofa inspect Qwen/Qwen3-0.6B
    """
    from ofa.models.load import check_source, load_model

    check_source(model, dtype=dtype)
    from ofa.anatomy import steps as anatomy

    loaded = load_model(
        model,
        dtype=dtype,
        device="cpu",
        offline=offline,
        trust_remote_code=trust_remote_code,
        progress=notice,
    )
    document = describe(loaded.model, anatomy.find(loaded.model), loaded.name)
    if as_json:
        show_json(document)
    else:
        _show(document)


def describe(model: CausalLM, anatomy: Anatomy, name: str) -> dict[str, object]:
    """The output of `ofa inspect` as JSON values."""
    conventions = Counter((norm.kind, norm.offset, norm.eps) for norm in anatomy.norms)
    return {
        "model": name,
        "family": anatomy.model_type,
        "wiring": anatomy.wiring,
        "layers": len(anatomy.layers),
        "steps": {"sublayer": len(anatomy.sublayer_steps), "layer": len(anatomy.layer_steps)},
        "tuned_parameters": anatomy.tuned_parameters,
        "norms": [
            {
                "kind": {"rms": "RMSNorm", "layer": "LayerNorm"}[kind],
                "multiplies_by": "1 + weight" if offset else "weight",
                "eps": eps,
                "count": count,
            }
            for (kind, offset, eps), count in conventions.items()
        ],
        "first_layer": [_step(step) for step in (anatomy.sublayer_steps or anatomy.layer_steps) if step.layer == 0],
        "estimators": _estimators(model, anatomy),
        "fused_layers": _fused_layers(model, anatomy),
    }


def _fused_layers(model: CausalLM, anatomy: Anatomy) -> dict[str, object]:
    """How many layers `ofa.fuse_layers` would fuse, and why not the others; dropout in training undoes it."""
    from ofa.anatomy.fused_layers import fuse_layers, unfuse_layers
    from ofa.models.introspection import dropout_rates, dropouts

    kept = fuse_layers(model)
    unfuse_layers(model)
    rates = [rate for _, module in dropouts(model) for rate in dropout_rates(module)]
    reasons = list(dict.fromkeys(kept.values()))
    if max(rates, default=0.0) > 0 and len(kept) < len(anatomy.layers):
        reasons.append(f"in training mode, dropout of {max(rates):g} needs the layers' own forward pass")
    return {"count": len(anatomy.layers) - len(kept), "remark": "; ".join(reasons)}


def _step(step: Step) -> dict[str, object]:
    return {
        "scale": step.scale,
        "branches": [
            {
                "role": branch.role,
                "norm": branch.norm.path,
                "from": branch.entry,
                "to": branch.exit,
                "reads": branch.reads,
            }
            for branch in step.branches
        ],
    }


def _estimators(model: CausalLM, anatomy: Anatomy) -> list[dict[str, object]]:
    """Each estimator, and whether it applies or why not; `auto` chooses exact if it applies, else hutchinson."""
    from ofa.regularizers.closed_form.recognize import why_not

    sublayer = "" if anatomy.sublayer_steps else "only with --granularity layer: the norm comes after the sum"
    reason = why_not(model, anatomy)
    exact = {
        "name": "exact",
        "applies": reason is None,
        "remark": reason or "closed form, no random probes; what auto chooses",
    }
    chosen = "" if reason is None else "what auto chooses"
    return [
        exact,
        {"name": "hutchinson", "applies": True, "remark": "; ".join(filter(None, (chosen, sublayer)))},
    ]


def _show(document: Json) -> None:
    facts = [(name, document[name]) for name in ("family", "wiring", "layers")]
    facts.append(("steps", ", ".join(f"{count} per {name}" for name, count in document["steps"].items() if count)))
    facts.append(("tuned parameters", f"{document['tuned_parameters']:,}"))
    for norm in document["norms"]:
        told = f"{norm['count']} × {norm['kind']}, times {norm['multiplies_by']}, epsilon {norm['eps']:g}"
        facts.append(("norms", told))
    for estimator in document["estimators"]:
        verdict = "applies" if estimator["applies"] else "does not apply"
        remark = f" ({estimator['remark']})" if estimator["remark"] else ""
        facts.append(("estimator", f"{estimator['name']}: {verdict}{remark}"))
    fused = document["fused_layers"]
    remark = f" ({fused['remark']})" if fused["remark"] else ""
    facts.append(("fused layers", f"{fused['count']} of {document['layers']}{remark}"))
    show_table((), facts, title=document["model"])
    layer = document["first_layer"][0]["branches"][0]["norm"].partition(".0.")[0] + ".0"
    steps = []
    for number, step in enumerate(document["first_layer"], start=1):
        for branch in step["branches"]:
            places = (branch[name].removeprefix(f"{layer}.") for name in ("norm", "from", "to"))
            steps.append((number, branch["role"], *places, branch["reads"], f"{step['scale']:g}"))
    columns = ("step", "branch", "preconditioned by", "starts at", "ends at", "reads", "scale")
    show_table(columns, steps, title=f"steps of {layer}")
