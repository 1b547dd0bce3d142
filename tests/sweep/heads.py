"""How a class reaches its output head and what it does with what the head returns, by looking at one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.sweep import dense
from tests.sweep.conventions import close, without_router_loss

_CAPS = (3.0, 5.0, 15.0, 20.0, 30.0, 50.0)


def head_facts(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The head's name and kind, how often it is called, what happens to its logits, what trains after it."""
    head = model.get_output_embeddings()
    if head is None:
        return {"head": None, "calls": 0, "after": "", "trains_after": [], "logits_of": _sources(model, batch)}
    raw: list[Tensor] = []

    def cut(_: nn.Module, _args: Any, output: Tensor) -> Tensor:
        raw.append(output.detach().clone().requires_grad_())
        return raw[-1] * 1  # some models write into what the head returns

    handle = head.register_forward_hook(cut)
    try:
        with without_router_loss(model):
            logits = dense.run(model, batch).get("logits")
    finally:
        handle.remove()
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    facts = {
        "head": next((name for name, module in model.named_modules() if module is head), "not among its modules"),
        "kind": "nn.Linear" if linear else type(head).__name__,
        "bias": getattr(head, "bias", None) is not None,
        "calls": len(raw),
        "after": "",
        "trains_after": [],
    }
    if not raw or not isinstance(logits, Tensor):
        return {**facts, "logits_of": _sources(model, batch)}
    return {**facts, "after": after_head(raw[-1].detach(), logits.detach()), "trains_after": _trained(model, logits)}


def _trained(model: nn.Module, logits: Tensor) -> list[str]:
    """Names of the parameters that these logits depend on, the head's output being cut off."""
    if not logits.requires_grad:
        return []
    model.zero_grad(set_to_none=True)
    (logits.float() * torch.randn_like(logits.float())).sum().backward()
    found = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def _sources(model: nn.Module, batch: dict[str, Any]) -> list[str]:
    """Modules whose output is the logits."""
    seen: list[tuple[str, Any]] = []

    def keep(name: str) -> Any:
        return lambda _module, _args, output: seen.append((name, output))

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        logits = dense.run(model, batch).get("logits")
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor):
        return []
    return [n for n, o in seen if isinstance(o, Tensor) and o.shape == logits.shape and torch.equal(o, logits)]


def after_head(raw: Tensor, logits: Tensor) -> str:
    """What turned the head's output `raw` into `logits`, in words, by trying."""
    raw, logits = raw.float(), logits.float()
    if raw.shape == logits.shape:
        return _elementwise(raw, logits)
    if raw.ndim == logits.ndim == 3 and raw.shape[0] == logits.shape[0]:
        rows, columns = logits.shape[1:]
        if raw.shape[1] == rows and raw.shape[2] > columns:
            return f"first {columns} of {raw.shape[2]} columns; {_elementwise(raw[..., :columns], logits)}"
        if raw.shape[2] == columns and raw.shape[1] > rows:
            for name, part in {"first": raw[:, :rows], "last": raw[:, -rows:]}.items():
                if torch.equal(part, logits):
                    return f"{name} {rows} of {raw.shape[1]} rows; nothing"
    return f"shape {list(raw.shape)} becomes {list(logits.shape)}"


def _elementwise(raw: Tensor, logits: Tensor) -> str:
    if torch.equal(raw, logits):
        return "nothing"
    kept = torch.isfinite(logits) & (logits > -1e4)
    if not kept.all():
        columns = (~kept).flatten(0, -2).all(0).nonzero().flatten().tolist()
        rest = _elementwise(torch.where(kept, raw, 0.0), torch.where(kept, logits, 0.0))
        return f"columns {columns} become {float(logits[~kept].min()):.3g}; {rest}"
    scale = float((raw * logits).sum() / (raw * raw).sum())
    if close(raw * scale, logits):
        return f"times {scale:.4g}"
    difference = logits - raw
    if close(difference, difference.flatten(0, -2)[0].expand_as(difference), 1e-4):
        return "plus a bias"
    if close(difference, difference[..., :1].expand_as(difference), 1e-4):
        return "plus a number for each row"
    for cap in _CAPS:
        uncapped = torch.atanh((logits / cap).clamp(-1 + 1e-6, 1 - 1e-6)) * cap
        scale = float((raw * uncapped).sum() / (raw * raw).sum())
        if close(cap * torch.tanh(raw * scale / cap), logits, 1e-4):
            return f"times {scale:.4g}, soft-cap {cap:g}"
    return "something else"
