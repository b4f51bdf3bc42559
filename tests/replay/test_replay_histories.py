"""Test random histories of the buffer against a model made of a dict and a list."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlv2v.replay import Clip, Frame, PrioritizedReplay, State

FRAME = (2, 3)
MAX_LEN = 4
Bytes = npt.NDArray[np.uint8]
PRIORITIES = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


@dataclass
class Item:
    state: Bytes
    action: Bytes
    reward: float
    true_frame: Bytes
    position: int
    terminal: bool
    end: bool
    priority: float


class Histories(RuleBasedStateMachine):
    @initialize(
        capacity=st.integers(1, 9),
        seed=st.integers(0, 2**64 - 1),
        stratified=st.booleans(),
        alpha=st.floats(0.1, 1),
        n_step=st.sampled_from((1, 1, 2, 3, 12)),
    )
    def start(self, capacity: int, seed: int, stratified: bool, alpha: float, n_step: int) -> None:
        self.replay = PrioritizedReplay(
            capacity, FRAME, MAX_LEN, alpha=alpha, seed=seed, stratified=stratified, n_step=n_step, gamma=0.5
        )
        self.items: dict[int, Item] = {}
        self.clips: list[tuple[Clip, Bytes]] = []
        self.num_added = 0
        self.num_frames = 0
        self.max_priority = 1.0

    def new_frames(self, count: int) -> Bytes:
        """Frames that differ from all before (up to 2^16 of them)."""
        numbers = np.arange(self.num_frames, self.num_frames + count)
        self.num_frames += count
        frames = np.zeros((count, *FRAME), np.uint8)
        frames[:, 0, 0], frames[:, 0, 1], frames[:, 1] = numbers % 256, numbers // 256, 7
        return frames

    def item(self, data: st.DataObject) -> tuple[Item, State, Frame, Frame]:
        """A transition whose parts are, each by chance, new frames or references to a clip."""
        state, action, true_frame = self.new_frames(data.draw(st.integers(1, MAX_LEN))), *self.new_frames(2)
        arguments: tuple[State, Frame, Frame] = (state, action, true_frame)
        if self.clips and data.draw(st.booleans()):
            clip, frames = data.draw(st.sampled_from(self.clips))
            start = data.draw(st.integers(0, len(frames) - 1))
            length = data.draw(st.integers(1, min(MAX_LEN, len(frames) - start)))
            index = data.draw(st.integers(0, len(frames) - 1))
            state, true_frame = frames[start : start + length], frames[index]
            arguments = ((clip, start, length), action, (clip, index))
        reward = data.draw(st.floats(-9, 9, width=32))
        terminal, end = data.draw(st.sampled_from(((False, False), (False, False), (True, False), (False, True))))
        item = Item(state, action, reward, true_frame, data.draw(st.integers(-5, 5)), terminal, end, self.max_priority)
        return item, *arguments

    def store(self, item: Item) -> None:
        self.items[self.num_added] = item
        self.num_added += 1
        if len(self.items) > self.replay.capacity:
            del self.items[min(self.items)]

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        item, state, action, true_frame = self.item(data)
        numbers = {name: getattr(item, name) for name in ("reward", "position", "terminal", "end")}
        added = self.replay.add(state=state, action=action, true_frame=true_frame, **numbers)
        assert added == self.num_added
        self.store(item)

    @rule(data=st.data(), count=st.integers(0, 12))
    def add_batch(self, data: st.DataObject, count: int) -> None:
        rows = [self.item(data) for _ in range(count)]
        parts = {name: [row[k] for row in rows] for k, name in ((1, "state"), (2, "action"), (3, "true_frame"))}
        numbers = {n: [getattr(row[0], n) for row in rows] for n in ("reward", "position", "terminal", "end")}
        ids = self.replay.add(**parts, **numbers)
        assert ids.tolist() == list(range(self.num_added, self.num_added + count))  # type: ignore[union-attr]
        for row in rows:
            self.store(row[0])

    @precondition(lambda self: self.clips)
    @rule(data=st.data(), count=st.integers(1, 12), length=st.integers(1, MAX_LEN))
    def add_arrays(self, data: st.DataObject, count: int, length: int) -> None:
        """One array a part, and windows of one clip by arrays of starts."""
        clip, frames = data.draw(st.sampled_from(self.clips))
        indices = np.array(data.draw(st.lists(st.integers(0, len(frames) - 1), min_size=count, max_size=count)))
        states, actions = np.stack([self.new_frames(length) for _ in range(count)]), self.new_frames(count)
        lengths = np.minimum(length, len(frames) - indices)
        windows = data.draw(st.booleans())
        self.replay.add(
            state=(clip, indices, lengths) if windows else states,
            action=actions,
            reward=np.arange(count, dtype=np.float32),
            true_frame=(clip, indices),
            position=np.arange(count),
        )
        for k in range(count):
            start = indices[k]
            state = frames[start : start + lengths[k]] if windows else states[k]
            item = Item(state, actions[k], float(k), frames[start], k, False, False, self.max_priority)
            self.store(item)

    def steps(self, id_: int) -> list[Item]:
        """The transitions that the n-step return from id_ goes over."""
        steps = [self.items[id_]]
        while len(steps) < self.replay.n_step and not (steps[-1].terminal or steps[-1].end):
            if id_ + len(steps) not in self.items:
                break
            steps.append(self.items[id_ + len(steps)])
        return steps

    @rule(count=st.integers(1, 6))
    def put_clip(self, count: int) -> None:
        frames = self.new_frames(count)
        self.clips.append((self.replay.put_clip(frames), frames))

    @precondition(lambda self: self.clips)
    @rule(data=st.data())
    def release_clip(self, data: st.DataObject) -> None:
        self.clips.pop(data.draw(st.integers(0, len(self.clips) - 1)))[0].release()

    @precondition(lambda self: self.num_added)
    @rule(data=st.data())
    def update(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.tuples(st.integers(0, self.num_added - 1), PRIORITIES), max_size=12))
        stale = self.replay.update_priorities([row[0] for row in rows], [row[1] for row in rows])
        assert stale == sum(id_ not in self.items for id_, _ in rows)
        for id_, priority in rows:
            if id_ in self.items:
                self.items[id_].priority = priority
                self.max_priority = max(self.max_priority, priority)

    @precondition(lambda self: any(item.priority for item in self.items.values()))
    @rule(n=st.integers(1, 20))
    def sample(self, n: int) -> None:
        batch = self.replay.sample(n)
        low = min(item.priority for item in self.items.values() if item.priority > 0)
        for row, id_ in enumerate(batch.ids.tolist()):
            item = self.items[id_]
            length = len(item.state)
            assert item.priority > 0
            assert batch.lengths[row] == length
            np.testing.assert_array_equal(batch.states[row, :length], item.state)
            assert not batch.states[row, length:].any()
            steps = self.steps(id_)
            last, next_length = steps[-1], len(steps[-1].state) + 1
            assert batch.next_lengths[row] == next_length
            np.testing.assert_array_equal(batch.next_states[row, : next_length - 1], last.state)
            np.testing.assert_array_equal(batch.next_states[row, next_length - 1], last.action)
            assert not batch.next_states[row, next_length:].any()
            np.testing.assert_array_equal(batch.actions[row], item.action)
            np.testing.assert_array_equal(batch.true_frames[row], item.true_frame)
            total = sum(step.reward * 0.5**k for k, step in enumerate(steps))
            np.testing.assert_allclose(batch.rewards[row], total, rtol=1e-6, atol=1e-6)
            assert batch.discounts[row] == 0.5 ** len(steps)
            assert batch.positions[row] == item.position
            assert batch.terminals[row] == last.terminal
            expected = (low / item.priority) ** (self.replay.alpha * self.replay.beta)
            np.testing.assert_allclose(batch.weights[row], expected, rtol=1e-5)

    @rule(alpha=st.floats(0.1, 1), beta=st.floats(0, 1))
    def anneal(self, alpha: float, beta: float) -> None:
        self.replay.alpha, self.replay.beta = alpha, beta

    @rule(to_file=st.booleans())
    def save_and_load(self, to_file: bool) -> None:
        fresh = PrioritizedReplay(self.replay.capacity, FRAME, MAX_LEN, n_step=self.replay.n_step, gamma=0.5)
        if to_file:
            with tempfile.TemporaryDirectory() as folder:
                self.replay.save(Path(folder) / "replay")
                fresh.load(Path(folder) / "replay")
        else:
            fresh.load_state_dict(self.replay.state_dict())
        self.replay = fresh
        self.clips.clear()

    @invariant()
    def sizes_agree(self) -> None:
        if not hasattr(self, "replay"):
            return
        assert len(self.replay) == len(self.items)
        held = {frame.tobytes() for _, frames in self.clips for frame in frames}
        for item in self.items.values():
            held.update(frame.tobytes() for frame in (*item.state, item.action, item.true_frame))
        assert self.replay.stats["frames"] == len(held)
        assert self.replay.is_consistent()


OPTIONS = {"stateful_step_count": 40, "deadline": None, "derandomize": True}


class TestHistories(Histories.TestCase):
    settings = settings(max_examples=50, **OPTIONS)


@pytest.mark.thorough
class TestManyHistories(Histories.TestCase):
    settings = settings(max_examples=2000, **OPTIONS)
