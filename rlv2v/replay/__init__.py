"""Prioritised experience replay for video: transitions whose frames are stored once, over a C++ core."""

from rlv2v.replay.buffer import Clip, Frame, Frames, PrioritizedReplay, ReplayBatch, State, States

__all__ = ["Clip", "Frame", "Frames", "PrioritizedReplay", "ReplayBatch", "State", "States"]
