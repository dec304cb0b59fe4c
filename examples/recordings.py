"""
Find repeated waveforms in a recording
======================================

Three neurons fire near four electrodes. The recording is noisy and their spikes overlap, but a code
with three learned atoms says which neuron fired, and when.
"""

import matplotlib.pyplot as plt
import numpy as np

from deconvnet import LearningSettings, learn_filters
from deconvnet.signals import as_images, as_signals

SECONDS, EPOCHS, RATE, LENGTH, START = 4, 30, 8000, 40, 17008

# %%
# The recording is simulated. The neurons differ in the width of their spikes, and in how strongly
# each electrode sees them.
random = np.random.default_rng(2)
recording, t = 0.2 * random.standard_normal((4, SECONDS * RATE)), np.arange(-12, LENGTH - 12)
spikes = [0.6 * np.exp(-((t / w - 2.5) ** 2)) - np.exp(-((t / w) ** 2)) for w in (2, 3, 4)]
gains = [[1, 0.6, 0.2, 0.1], [0.3, 1, 0.4, 0.1], [0.1, 0.5, 1, 0.6]]
fired = random.random((3, SECONDS * RATE)) < 40 / RATE
for spike, gain, times in zip(spikes, gains, fired, strict=True):
    recording += np.outer(gain, np.convolve(times, spike)[12 : 12 + SECONDS * RATE])

# %%
# Signals are images of one row. A neuron adds spikes and never subtracts any, so coefficients must
# not be negative. A spike is found if it correlates with its atom by more than 1/lam, half a unit,
# beside what other spikes explain.
signals, learning = (
    as_images(recording[None].astype(np.float32)),
    LearningSettings(EPOCHS, taper=0.2),
)
learned = learn_filters(signals, 3, (1, LENGTH), lam=2.0, non_negative=True, learning=learning)
atoms, events = as_signals(learned.filters).numpy(), learned.encode(signals).events()
strong, order = events[events.value > 0.7], np.abs(atoms).max(2).argmax(1).argsort()

# %%
# Below 60 ms of the recording: when each neuron fired (dots), and the events of its atom (lines).
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), width_ratios=[4, 1], layout="tight")
shown = slice(START, START + 480)
left.plot(recording[:, shown].T - 2 * np.arange(4), "0.5", lw=0.8)
for n, k in enumerate(order):
    found = strong.corners()[strong.map == k, 1].numpy() + atoms[k, n].argmin()
    true = np.flatnonzero(fired[n])
    hits = np.mean([np.abs(found - time).min() <= 2 for time in true])
    wrong = np.mean([np.abs(true - time).min() > 2 for time in found])
    print(
        f"neuron {n}: {hits:.1%} of its {len(true)} spikes found, {wrong:.1%} of its events wrong"
    )
    left.plot(true - START, np.full(len(true), -8 - n), "o", color=f"C{n}")
    left.vlines(found - START, -8.45 - n, -7.55 - n, color=f"C{n}")
    right.plot(atoms[k].T / np.ptp(atoms[k]) - 1.5 * n, color=f"C{n}")
left.set(xlim=(0, 480), xlabel="samples of 1/8 ms", yticks=[])
left.set_title("what four electrodes record; spikes of three neurons (dots) and events (lines)")
right.set(xlabel="samples", yticks=[], title="learned atoms")
plt.show()
