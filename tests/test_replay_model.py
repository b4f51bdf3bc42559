"""Random histories of the buffer against a model made of a dict and a list."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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
    priority: float


class Histories(RuleBasedStateMachine):
    @initialize(
        capacity=st.integers(1, 9), seed=st.integers(0, 2**64 - 1), stratified=st.booleans(), alpha=st.floats(0.1, 1)
    )
    def start(self, capacity: int, seed: int, stratified: bool, alpha: float) -> None:
        self.replay = PrioritizedReplay(capacity, FRAME, MAX_LEN, alpha=alpha, seed=seed, stratified=stratified)
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
        given: tuple[State, Frame, Frame] = (state, action, true_frame)
        if self.clips and data.draw(st.booleans()):
            clip, frames = data.draw(st.sampled_from(self.clips))
            start = data.draw(st.integers(0, len(frames) - 1))
            length = data.draw(st.integers(1, min(MAX_LEN, len(frames) - start)))
            at = data.draw(st.integers(0, len(frames) - 1))
            state, true_frame = frames[start : start + length], frames[at]
            given = ((clip, start, length), action, (clip, at))
        reward, terminal = data.draw(st.floats(-9, 9, width=32)), data.draw(st.booleans())
        item = Item(state, action, reward, true_frame, data.draw(st.integers(-5, 5)), terminal, self.max_priority)
        return item, *given

    def remember(self, item: Item) -> None:
        self.items[self.num_added] = item
        self.num_added += 1
        if len(self.items) > self.replay.capacity:
            del self.items[min(self.items)]

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        item, state, action, true_frame = self.item(data)
        added = self.replay.add(
            state=state,
            action=action,
            reward=item.reward,
            true_frame=true_frame,
            position=item.position,
            terminal=item.terminal,
        )
        assert added == self.num_added
        self.remember(item)

    @rule(data=st.data(), count=st.integers(0, 12))
    def add_batch(self, data: st.DataObject, count: int) -> None:
        rows = [self.item(data) for _ in range(count)]
        ids = self.replay.add(
            state=[row[1] for row in rows],
            action=[row[2] for row in rows],
            reward=[row[0].reward for row in rows],
            true_frame=[row[3] for row in rows],
            position=[row[0].position for row in rows],
            terminal=[row[0].terminal for row in rows],
        )
        assert ids.tolist() == list(range(self.num_added, self.num_added + count))  # type: ignore[union-attr]
        for row in rows:
            self.remember(row[0])

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
            np.testing.assert_array_equal(batch.next_states[row, :length], item.state)
            np.testing.assert_array_equal(batch.next_states[row, length], item.action)
            assert not batch.states[row, length:].any()
            assert not batch.next_states[row, length + 1 :].any()
            np.testing.assert_array_equal(batch.actions[row], item.action)
            np.testing.assert_array_equal(batch.true_frames[row], item.true_frame)
            assert (batch.rewards[row], batch.positions[row]) == (item.reward, item.position)
            assert batch.terminals[row] == item.terminal
            expected = (low / item.priority) ** (self.replay.alpha * self.replay.beta)
            np.testing.assert_allclose(batch.weights[row], expected, rtol=1e-5)

    @rule(alpha=st.floats(0.1, 1), beta=st.floats(0, 1))
    def anneal(self, alpha: float, beta: float) -> None:
        self.replay.alpha, self.replay.beta = alpha, beta

    @rule()
    def save_and_load(self) -> None:
        fresh = PrioritizedReplay(self.replay.capacity, FRAME, MAX_LEN)
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
        assert self.replay._native.consistent()


Histories.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestHistories = Histories.TestCase
