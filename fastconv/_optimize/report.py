# SPDX-License-Identifier: MIT
"""What became of a model's layers, in words."""

from __future__ import annotations

from collections import Counter

from torch import nn


class Report:
    """What `optimize` did, layer by layer; `str` makes a table of it."""

    def __init__(self, name: str):
        self.name = name
        self.gains = False
        self.rows: list[tuple[str, ...]] = []  # layer, what it became, why no more; or a heading

    def leave(self, path: str, module: nn.Module, why: str) -> None:
        self.rows.append((path or self.name, f"{type(module).__name__} as it is", why))

    def swap(self, path: str, module: nn.Module) -> None:
        self.gains = True
        self.rows.append((path or self.name, f"fastconv.{type(module).__name__}", "by itself"))

    def add(self, path: str, plan) -> None:
        """Tells of a traced model's programs; of one alone where training changes nothing."""
        self.gains = self.gains or plan.gains
        texts = {}
        for training, program in plan.by_mode().items():
            texts.setdefault(tuple(_rows(program, f"{path}." if path else "")), []).append(training)
        for rows, modes in texts.items():
            if len(texts) > 1:
                self.rows.append(("in training" if modes[0] else "in eval mode",))
            self.rows += rows

    def __str__(self) -> str:
        gains = "" if self.gains else ": nothing to gain, it stays as it is"
        return "\n".join([f"{self.name}{gains}", *table(self.rows)])


def table(rows) -> list[str]:
    """Lines with the columns aligned; a row of one cell is a heading."""
    columns = zip(*(row for row in rows if len(row) > 1), strict=True)
    widths = [max(map(len, column)) for column in columns]
    return [
        row[0]
        if len(row) == 1
        else "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _rows(program, prefix):
    chains = 0
    for fused in program.fused:
        chains += len(fused.blocks) > 1
        for block in fused.blocks:
            made = " + ".join(layer.kind for layer in block.layers)
            why = f"chain {chains}, one operator" if len(fused.blocks) > 1 else fused.why
            why = why or next((layer.note for layer in block.layers if layer.note), "")
            yield prefix + block.layers[0].name, made, why
    for path, (kind, why) in program.left.items():
        yield prefix + path, f"{kind} as it is", why
    rest = Counter(
        str(getattr(node.target, "__name__", node.target))
        if node.op != "call_module"
        else program.kinds[node]
        for node in program.graph.nodes
        if node.op.startswith("call") and node not in program.own and node.target not in program.left
    )
    if rest:
        yield "others", "torch's", ", ".join(f"{name} x{count}" for name, count in rest.items())
