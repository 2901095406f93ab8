"""Prompts as a tree, in which a shared prefix appears only once.

A causal model gives equal prefixes equal values. So what is computed for each token needs to be computed only once for
all prompts with the same beginning; attention then reads a token's ancestors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .task import Task

__all__ = ["Packed", "pack"]


@dataclass(frozen=True)
class Packed:
    """Some prompts of a task, with their different prefixes numbered so that ancestors come first.

    Attributes:
        rows: The numbers of the prompts in the task, (prompts,).
        ids: Token ids, (prompts, length), padded on the right.
        first: Where the last token of each prefix first occurs in the flattened ids, (prefixes,).
        ancestors: Which tokens each token reads, including itself, bool (prefixes, prefixes).
        depth: The position of each prefix's last token, (prefixes,).
        asked: The prefix of each question, (prompts,).
    """

    rows: Tensor
    ids: Tensor
    first: Tensor
    ancestors: Tensor
    depth: Tensor
    asked: Tensor

    def on(self, device: torch.device) -> Packed:
        """Move the tensors to the model's device, except ``rows``, which stay on the CPU with the task."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "first", "ancestors", "depth", "asked")}
        return replace(self, **moved)


def pack(task: Task, most: int) -> list[Packed]:
    """Group the prompts into packs of about ``most`` different prefixes, keeping common beginnings together."""
    prompts = [tuple(task.ids[i, : int(task.asked[i]) + 1].tolist()) for i in range(len(task))]
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    groups: list[list[int]] = []
    seen: set[tuple[int, ...]] = set()
    for i in order:
        new = {prompts[i][:end] for end in range(1, len(prompts[i]) + 1)}
        if not groups or len(seen | new) > most:
            groups.append([])
            seen = set()
        groups[-1].append(i)
        seen |= new
    return [_packed(task, group, [prompts[i] for i in group]) for group in groups]


def _packed(task: Task, group: list[int], prompts: list[tuple[int, ...]]) -> Packed:
    part = task.part(torch.tensor(group, dtype=torch.int64, device="cpu"))
    length = part.ids.shape[1]
    number: dict[tuple[int, ...], int] = {}
    first: list[int] = []
    parents: list[int | None] = []
    depth: list[int] = []
    asked: list[int] = []
    for row, prompt in enumerate(prompts):
        for end in range(1, len(prompt) + 1):
            prefix = prompt[:end]
            if prefix not in number:
                number[prefix] = len(first)
                first.append(row * length + end - 1)
                parents.append(number[prompt[: end - 1]] if end > 1 else None)
                depth.append(end - 1)
        asked.append(number[prompt])
    ancestors = torch.eye(len(first), dtype=torch.bool, device="cpu")
    for i, parent in enumerate(parents):
        if parent is not None:
            ancestors[i] |= ancestors[parent]
    return Packed(
        torch.tensor(group, dtype=torch.int64, device="cpu"),
        part.ids,
        torch.tensor(first, dtype=torch.int64, device="cpu"),
        ancestors,
        torch.tensor(depth, dtype=torch.int64, device="cpu"),
        torch.tensor(asked, dtype=torch.int64, device="cpu"),
    )
