"""What is recorded and replayed: a tape of the operators that a phase calls stands in for a CUDA graph.

The tape keeps what a CUDA graph keeps: which operators ran, on which memory. A replay runs them again on that memory
and nothing else; a number of the host that changed since, or memory that the recording did not know, is missed as a
graph would miss it. An operator that reads a number back to the host is refused, as it is while a graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.clips import Clips
from rlv2v.method.step import Algorithm
from rlv2v.runtime.cuda_graphs import NUM_PLAIN, Graphs, Recorder

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Tape(TorchDispatchMode):
    """Records every operator; `replay` runs them again, each result into the memory of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"{name}: the host would wait for the device")
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        self.calls.append((func, args, kwargs or {}, tensors))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outputs in self.calls:
                again = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, Tensor)]
                for mine, new in zip(outputs, again, strict=True):
                    if mine.data_ptr() != new.data_ptr():  # neither a view nor in place
                        mine.copy_(new)


class Tapes(Recorder):
    """Records as CUDA graphs that share a pool do: a replay may overwrite what the other phases gave."""

    def __init__(self) -> None:
        self.outputs: list[list[Tensor]] = []
        self.recording = False

    def plain(self, phase: Callable[..., Any], inputs: tuple[Tensor | None, ...]) -> Any:
        return phase(*inputs)

    def record(self, phase: Callable[..., Any], inputs: tuple[Tensor | None, ...]) -> tuple[Callable[[], None], Any]:
        """Nothing has been changed by the recording when it returns."""
        live = [t for t in gc_tensors() if t.is_leaf]
        before = [(t, t.detach().clone()) for t in live]
        self.recording = True
        with Tape() as tape:
            outputs = phase(*inputs)
        self.recording = False
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        mine = [t for t in tree_flatten(outputs)[0] if isinstance(t, Tensor)]
        assert not any(t.requires_grad for t in mine)
        self.outputs.append(mine)

        def replay() -> None:
            for others in self.outputs:
                for tensor in others:
                    tensor.fill_(float("nan"))
            tape.replay()

        return replay, outputs


STATE: list[Algorithm] = []


def gc_tensors() -> list[Tensor]:
    """All that a phase may change: weights, buffers, moments, the schedule."""
    algorithm = STATE[-1]
    found: list[Tensor] = []
    for part in algorithm.state_parts.values():
        state = part.state_dict()
        found += [t for t in tree_flatten(state)[0] if isinstance(t, Tensor)]
    return found


def clips_of(config: Config, seed: int) -> Clips:
    rng = torch.Generator().manual_seed(seed)

    def noise(num: int, frames: int) -> Tensor:
        return torch.rand(num, frames, 3, config.data.size, config.data.size, generator=rng) * 2 - 1

    sets = [noise(num, config.data.frames) for num in (config.data.batch_x, config.data.batch_y, config.data.batch_z)]
    return Clips(*sets, noise(config.data.batch_s, 1))


def run(config: Config, recorder: Tapes | None, steps: int) -> tuple[list[dict[str, float]], Algorithm]:
    algorithm = Algorithm(config, torch.device("cpu"), graphs=Graphs(recorder))
    STATE.append(algorithm)
    algorithm.start()

    def mark(part: str) -> None:
        assert recorder is None or not recorder.recording, f"{part}: an event of its own inside a recording"

    told = []
    for step in range(steps):
        values = algorithm.step(clips_of(config, step), mark)
        values |= algorithm.advance(float(step + 1), values.pop("distance"))
        told.append({name: value.item() for name, value in values.items()})
    return told, algorithm


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_a_recorded_run_is_the_plain_run(preset: str, precision: str) -> None:
    small = {"size": 16, "frames": 4, "widths": (4, 8), "disc_widths": (4, 8), "rl_every": 1, "steps": 40}
    config = Config.of(preset, replicas=1, precision=precision, replay_alpha=0.5, **small).check()
    steps = 2 * NUM_PLAIN + 5  # each domain's turn comes every second step
    recorded, ours = run(config, Tapes(), steps)
    plain, theirs = run(config, None, steps)
    phases = {"critics_x", "critics_y", "generators_x", "generators_y", "discriminators"}
    assert set(ours.graphs.recorded) == phases
    assert recorded == plain
    for name, part in ours.state_parts.items():
        mine, other = (tree_flatten(p.state_dict())[0] for p in (part, theirs.state_parts[name]))
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


def test_a_number_of_the_host_would_be_missed() -> None:
    """The tape is no tautology: what it may not replay right, it replays wrong."""
    number, held = [1.0], torch.zeros(2)

    class Simple(Tapes):
        def record(self, phase: Callable[..., Any], inputs: Any) -> Any:
            with Tape() as tape:
                outputs = phase(*inputs)
            return tape.replay, outputs

    graphs = Graphs(Simple())

    def phase(x: Tensor) -> Tensor:
        held.add_(x)
        return x * number[0] + held

    for call in range(NUM_PLAIN + 2):
        number[0] = float(call)
        got = graphs("phase", phase, torch.ones(2))
    assert got.tolist() != (torch.ones(2) * number[0] + held).tolist()
    with pytest.raises(RuntimeError, match="host would wait"), Tape():
        torch.ones(1).item()


def test_nothing_is_recorded_before_all_had_their_plain_calls() -> None:
    """Else the plain calls of one phase would need memory beside the recordings of the others."""
    recorded: list[str] = []

    class Names(Tapes):
        def record(self, phase: Callable[..., Any], inputs: Any) -> Any:
            recorded.append(phase())
            return lambda: None, None

    graphs = Graphs(Names())
    for _ in range(NUM_PLAIN):
        for name in ("often", "often", "seldom"):
            assert graphs(name, lambda name=name: name) == name
    assert not recorded
    for name in ("often", "seldom", "often"):
        graphs(name, lambda name=name: name)
    assert recorded == ["often", "seldom"]


def test_what_cannot_be_recorded_says_how_to_go_on() -> None:
    class Broken(Tapes):
        def record(self, phase: Callable[..., Any], inputs: Any) -> Any:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")

    graphs = Graphs(Broken())
    for _ in range(NUM_PLAIN):
        graphs("critics", list)
    with pytest.raises(UserError, match=r"phase 'critics' .*\(CUDA error: .* capturing\); train with --no-graphs"):
        graphs("critics", list)


def test_a_step_reads_nothing_back() -> None:
    """Between the replay buffer and the log no operator of a step waits for the device."""
    config = Config.of("tiny", replicas=1, rl_every=1, replay_alpha=0.5, steps=9).check()
    algorithm = Algorithm(config, torch.device("cpu"))
    algorithm.start()
    for step in range(4):
        with Tape():
            told = algorithm.step(clips_of(config, step))
            algorithm.advance(float(step), told.pop("distance"))
        algorithm.flush()


def test_replicas_of_one_rank_draw_for_themselves() -> None:
    """The same clips for both, yet other prefixes, other proposals, other transitions."""
    config = Config.of("tiny", replicas=2, rl_every=1, eta1=(0.0, 0.0), transitions=8, steps=9).check()
    algorithm = Algorithm(config, torch.device("cpu"))
    algorithm.start()
    one = clips_of(config, 0)
    algorithm.step(Clips(*(torch.cat((s, s)) for s in (one.x, one.y, one.z, one.s) if s is not None)))
    algorithm.flush()
    first, second = (replay.state_dict() for replay in algorithm.agents["x"].replays)
    assert first["rewards"].tolist() != second["rewards"].tolist()
    assert first["seed"] != second["seed"]
