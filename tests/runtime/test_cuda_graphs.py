"""Phases that are recorded and replayed; a tape of the operators that a phase calls stands in for a CUDA graph.

The tape holds what a CUDA graph holds: which operators ran, on which memory. A replay runs them again on that memory
and nothing else. So it misses what a graph would miss: a number of the host that has changed, or memory that the
recording did not know. An operator that reads a number back to the host is refused, as during a graph's capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.clips import Clips
from rlv2v.method.step import Algorithm
from rlv2v.runtime.cuda_graphs import NUM_PLAIN, Graphs, Recorder

pytestmark = pytest.mark.usefixtures("one_thread")
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Tape(TorchDispatchMode):
    """Records every operator; `replay` runs them again and writes each result into the memory of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"{name}: the host would wait for the device")
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.calls.append((func, args, kwargs or {}, tensors))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outputs in self.calls:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for mine, new in zip(outputs, again, strict=True):
                    if mine.data_ptr() != new.data_ptr():  # neither a view nor in place
                        mine.copy_(new)


class Tapes(Recorder):
    """Records as CUDA graphs that share a pool do: a replay may overwrite the outputs of the other phases."""

    def __init__(self, state: Callable[[], Iterable[Tensor]] = tuple) -> None:
        self.outputs: list[Tensor] = []
        self.state, self.recording = state, False

    def plain(self, phase: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        return phase(*inputs)

    def record(self, phase: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Callable[[], None], Any]:
        """Record a phase, and undo what it changed meanwhile: a capture computes nothing."""
        old = [(t, t.detach().clone()) for t in self.state()]
        self.recording = True
        with Tape() as tape:
            outputs = phase(*inputs)
        self.recording = False
        with torch.no_grad():
            for tensor, value in old:
                tensor.copy_(value)
        tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        assert not any(t.requires_grad for t in tensors), "an autograd graph would be kept"
        self.outputs += tensors

        def replay() -> None:
            for tensor in self.outputs:
                tensor.fill_(float("nan"))
            tape.replay()

        return replay, outputs


def state_of(algorithm: Algorithm) -> list[Tensor]:
    """Return all that a phase may change: weights, buffers, moments, the schedule."""
    states = [part.state_dict() for part in algorithm.state_parts.values()]
    return [t for t in tree_leaves(states) if isinstance(t, Tensor) and t.is_leaf]


def clips_of(config: Config, seed: int) -> Clips:
    rng = torch.Generator().manual_seed(seed)

    def noise(num: int, frames: int) -> Tensor:
        return torch.rand(num, frames, 3, config.data.size.height, config.data.size.width, generator=rng) * 2 - 1

    sets = [noise(num, config.data.frames) for num in (config.data.batch_x, config.data.batch_y, config.data.batch_z)]
    return Clips(*sets, noise(config.data.batch_s, 1))


def run(config: Config, steps: int, *, record: bool) -> tuple[list[dict[str, float]], Algorithm]:
    recorder = Tapes(lambda: state_of(algorithm)) if record else None
    algorithm = Algorithm(config, torch.device("cpu"), graphs=Graphs(recorder))
    algorithm.start()

    def book_time(section: str) -> None:
        assert recorder is None or not recorder.recording, f"{section}: cannot be timed inside a recording"

    logs = []
    for step in range(steps):
        values = algorithm.step(clips_of(config, step), book_time)
        values |= algorithm.advance(float(step + 1))
        logs.append({name: value.item() for name, value in values.items()})
    return logs, algorithm


@pytest.mark.parametrize(
    ("preset", "precision"),
    [
        ("tiny", "fp32"),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in [("tiny", "bf16"), ("paper", "fp32"), ("paper", "bf16")]
        ),
    ],
)
def test_a_recorded_run_is_the_plain_run(preset: str, precision: str) -> None:
    small = {"size": "8x12", "frames": 3, "widths": (4,), "disc_widths": (4, 4), "rl_every": 1, "steps": 40}
    config = Config.of(preset, replicas=1, precision=precision, replay_alpha=0.5, **small).check()
    steps = 2 * NUM_PLAIN + 4  # each domain's turn comes every second step
    recorded, ours = run(config, steps, record=True)
    plain, theirs = run(config, steps, record=False)
    phases = {"critics_x", "critics_y", "generators_x", "generators_y", "discriminators"}
    assert ours.graphs.recorded == phases
    assert recorded == plain
    for name, part in ours.state_parts.items():
        states = (tree_leaves(p.state_dict()) for p in (part, theirs.state_parts[name]))
        for a, b in zip(*states, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


class Inputs(NamedTuple):
    a: Tensor
    b: Tensor | None


def test_inputs_and_outputs_keep_their_structure_and_belong_to_the_caller() -> None:
    weight = torch.ones(2, requires_grad=True)

    def phase(name: str, inputs: Inputs, scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        assert inputs.b is None
        return {name: inputs.a * scale * weight}, inputs.a + 1

    graphs, outputs = Graphs(Tapes()), []
    for call in range(NUM_PLAIN + 3):
        logs, more = graphs("phase", phase, "sum", Inputs(torch.full((2,), float(call)), None), torch.tensor(2.0))
        assert not logs["sum"].requires_grad
        outputs.append((logs["sum"].tolist(), logs["sum"], more))
    assert graphs.recorded == {"phase"}
    for call, (values, tensor, more) in enumerate(outputs):
        assert values == tensor.tolist() == [2.0 * call] * 2 and more.tolist() == [call + 1.0] * 2


def test_a_number_of_the_host_would_be_missed() -> None:
    """The tape is no tautology: what a graph replays wrong, it replays wrong."""
    number, graphs = [1.0], Graphs(Tapes())
    for call in range(NUM_PLAIN + 2):
        number[0] = float(call)
        result = graphs("phase", lambda x: x * number[0], torch.ones(2))
    assert result.tolist() != [number[0]] * 2
    with pytest.raises(RuntimeError, match="host would wait"), Tape():
        torch.ones(1).item()


def test_no_phase_is_recorded_before_all_had_their_plain_calls() -> None:
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


def test_a_phase_that_cannot_be_recorded_says_how_to_go_on() -> None:
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
    small = {"size": 8, "widths": (4,), "disc_widths": (4, 4)}
    config = Config.of("tiny", replicas=1, rl_every=1, replay_alpha=0.5, steps=9, **small).check()
    algorithm = Algorithm(config, torch.device("cpu"))
    algorithm.start()
    for step in range(3):  # the third draws what the first one stored
        with Tape():
            algorithm.step(clips_of(config, step))
            algorithm.advance(float(step))
        algorithm.flush()


def test_replicas_of_one_rank_draw_for_themselves() -> None:
    """Both have the same clips, yet other prefixes, other candidates, other transitions."""
    small = {"size": 8, "widths": (4,), "disc_widths": (4, 4)}
    config = Config.of("tiny", replicas=2, rl_every=1, eta1=(0.0, 0.0), transitions=8, steps=9, **small).check()
    algorithm = Algorithm(config, torch.device("cpu"))
    algorithm.start()
    algorithm.step(Clips(*(torch.cat((v, v)) for v in clips_of(config, 0) if v is not None)))
    algorithm.flush()
    first, second = (replay.state_dict() for replay in algorithm.agents["x"].replays)
    assert first["rewards"].tolist() != second["rewards"].tolist()
    assert first["seed"] != second["seed"]
