"""The README.md of an adapter folder: what it is, what it was made from, how to use it."""

from __future__ import annotations

import json
from typing import Any

_USE = """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")
```

or, with the task's template and label words applied:

```bash
ofa predict PATH_OF_THIS_FOLDER --text "..."
```
"""

_QUANTIZED = """\
It was tuned and scored on a 4-bit (Q4_1) copy of that base, the one `ofa` fetches by default and `ofa predict` goes
back to; on the original weights the scores may differ.
"""


def model_card(details: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read; `details` is the content of `ofa_config.json`."""
    task = details.get("task") or {}
    base = f"`{details['base_model']}`" if details["base_model"] else "an unnamed model"
    parts = [
        _front_matter(details),
        f"# Norm scales for {task.get('name', 'a task')}\n",
        f"{details['parameters']:,} tuned norm scales of {base}, and nothing else: a PEFT LN-tuning "
        "adapter made with `ofa` (Optimization-inspired Few-shot Adaptation, arXiv 2505.19107).\n",
        _QUANTIZED if details.get("base_source") == "embedded" else "",
        _data(details, task),
        _scores(details.get("scores") or {}),
        f"## Use\n\n{_USE}",
        "Made with " + ", ".join(f"{name} {version}" for name, version in details["versions"].items()) + ".\n",
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(details: dict[str, Any]) -> str:
    base = details["base_model"]
    lines = ["---", "library_name: peft", "tags: [few-shot, ln-tuning, ofa]"]
    if base:
        # A JSON string is a YAML one, whatever is in the path.
        lines.append(f"base_model: {json.dumps(base, ensure_ascii=False)}")
    return "\n".join([*lines, "---\n"])


def _data(details: dict[str, Any], task: dict[str, Any]) -> str:
    if not task:
        return ""
    rows = {
        "template": f"`{task['template']!r}`".replace("|", "\\|"),
        "labels": ", ".join(task["labels"]).replace("|", "\\|") or "none (free completion)",
        "shots": details.get("shots"),
        "seed": details.get("seed"),
        "method": details.get("method"),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return f"## Made from\n\n| | |\n|---|---|\n{table}\n"


def _scores(scores: dict[str, Any]) -> str:
    if not scores:
        return ""
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in scores.items() if isinstance(value, float))
    return f"## Scores\n\n| measure | value |\n|---|---|\n{rows}\n"
