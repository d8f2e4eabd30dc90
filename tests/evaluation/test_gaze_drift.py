"""Drift of the labels as a gaze network sees it."""

import numpy as np

from fastsimgan.data.simulators.eyes import simulate_eyes
from fastsimgan.evaluation.gaze_drift import gaze_drift
from fastsimgan.evaluation.task_network import Judge, Labelled


def test_gaze_drift_is_zero_where_nothing_changed_and_not_where_eyes_were_exchanged():
    eyes = simulate_eyes(30, 3)
    part = Labelled(eyes["images"], eyes["pitch_yaw"], "gaze")
    judge = Judge(steps=8, batch_size=8)
    assert gaze_drift(part, part.images, part.images, judge=judge).max() < 1e-3
    assert gaze_drift(part, part.images, np.roll(part.images, 1, 0), judge=judge).mean() > 0.1
