"""Shared by tests of methods: a task, and the state of a model that a method must restore."""

from __future__ import annotations

from ofa.tasks.task import Example, Task

TASK = Task(name="mood", template="Review: {text}\nSentiment:", labels=("negative", "positive"))

SHOTS = (
    Example("a warm and funny film", "positive"),
    Example("dull, slow and far too long", "negative"),
    Example("never drags", "positive"),
    Example("far too long", "negative"),
)

TEXTS = ["a film that drags", "warm", "slow and dull and funny"]


def state(model):
    """State that a method must restore: parameters and their flags, buffers, modes, hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "parameters": [(name, id(p), p.dtype, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "values": [value.float().tolist() for value in (*model.parameters(), *model.buffers())],
        "modes": [module.training for module in model.modules()],
        "hooks": [[len(getattr(module, name)) for name in hooks] for module in model.modules()],
    }


def restored(model, tokenizer):
    """Yields a model with mixed modes and flags; checks afterwards that the test restored them."""
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    yield model, tokenizer
    assert state(model) == before


def at_step_2(act):
    def progress(record, total):
        if record.step == 2:
            act()

    return {"progress": progress}
