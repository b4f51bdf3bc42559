"""The ConvLSTM's shapes on a GPU, and four networks in one call against four calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from convlstm_layer import PASSES, Form, Layer, Shape, limits_of, noise, obstacle, solved, stacked
from convlstm_peers import eager, mine
from convlstm_rows import Case, Contender, Row, case_rows, cuda_us, wall_us

SIDES = {32: 32, 64: 16, 128: 8, 256: 8}
"""Of the frames, by channels."""
SHAPES = [Shape(batch, 8, c, c, side, side) for c, side in SIDES.items() for batch in (1, 2, 4, 16)]
DTYPES = (torch.float16, torch.bfloat16)
NETWORKS = 4


def grouped_rows(
    shape: Shape, dtype: torch.dtype, backend: str, rounds: int, device: str = "cuda"
) -> tuple[list[Row], dict[str, str]]:
    """Rows of four networks of a shape: in one call, in four of ours, in four of eager; and why there are none."""
    form, name = mine(backend, dtype, "frame-major"), f"{NETWORKS} networks {shape}"
    why = obstacle(form, shape, device, NETWORKS)
    if why is not None:
        print(f"{name} | {form.label:30} | not measured: {why}", flush=True)
        return [], {f"{name}, {form.label}": why}
    data = [solved(noise(shape, seed), device) for seed in range(NETWORKS)]
    ways = {
        "eager": [Layer(Form("eager", dtype, eager, joined=True), one, device) for one in data],
        f"{backend} {NETWORKS} calls": [Layer(form, one, device) for one in data],
        f"{backend} grouped": [Layer(form, stacked(data), device)],
    }
    found = {way: worst([layer.check() for layer in layers]) for way, layers in ways.items()}
    whole, rows = shape._replace(batch=NETWORKS * shape.batch), list[Row]()
    for passes in PASSES:
        contenders = []
        for way, layers in ways.items():
            call = all_of([layer.call(passes) for layer in layers])
            contenders.append(Contender(way, dtype, call, whole.work(passes, dtype), ours=way != "eager"))
        contenders += limits_of(whole, passes, [dtype], device)
        rows += case_rows(Case(name, passes, contenders, found), rounds, cuda_us if device == "cuda" else wall_us)
    return rows, {}


def worst(found: list[dict[str, float]]) -> dict[str, float]:
    """The largest of each difference; not a number where one is not."""
    return {key: torch.tensor([one[key] for one in found]).max().item() for key in found[0]}


def all_of(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """One call after the other, their results held to the end, as a training would."""
    return lambda: [call() for call in calls]
