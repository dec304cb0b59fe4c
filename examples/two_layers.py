"""
Two layers, and what the switches keep
======================================

Layer 1 explains photographs by edges, and layer 2 the strongest of those by corners, crossings and
curves. The switches of the max pooling between them say where each maximum was. Without them, the
edges of the image that layer 2 paints break.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage import data
from skimage.transform import rescale

from deconvnet import DeconvNet, LayerSettings, LearningSettings, PreprocessingSettings, train
from deconvnet.visualization import filter_grid, pixel_features

EPOCHS, SIDE, NUM_MAPS = 12, 112, (16, 44)

crops = []  # two of each photograph
for photograph in (data.chelsea(), data.coffee(), data.astronaut(), data.stereo_motorcycle()[0]):
    small = rescale(photograph, 0.5, channel_axis=2, anti_aliasing=True)
    top, left = small.shape[0] // 2 - SIDE // 2, small.shape[1] // 2 - SIDE
    crops += np.split(small[top : top + SIDE, left : left + 2 * SIDE], 2, axis=1)
images = torch.tensor(np.stack(crops)).float().permute(0, 3, 1, 2).clamp(0, 1)

# %%
# The network takes grey values, without their local mean and contrast. Each feature of layer 2
# combines two of the maps below.
edges = LearningSettings(EPOCHS, batch_size=4)
pairs = LearningSettings(EPOCHS, batch_size=4, init="random", norm="plane")
one = LayerSettings(NUM_MAPS[0], 7, 2.0, pool=[1, 2, 2], learning=edges)
two = LayerSettings(NUM_MAPS[1], 5, 1.0, connectivity="random_doubles", learning=pairs)
net = DeconvNet([one, two], PreprocessingSettings(color="grey"))
results = train(net, images)

# %%
# "centre" puts every maximum in the middle of its window, whatever its switch.
codes = net.infer(images)
shown = {"input": codes.y}
for layer, unpooling in [(1, "switches"), (2, "switches"), (2, "centre")]:
    net.layer(1).settings.unpooling = unpooling
    title = f"layer {layer}: {net.snr(codes, layer):.1f} dB" + (unpooling == "centre") * ", centre"
    shown[title] = net.synthesize(codes, layer)
print("SNR of", ", of ".join(list(shown)[1:]))
figure, axes = plt.subplots(2, 4, figsize=(9, 5), layout="constrained")
for cell, (title, y) in zip(axes[0], shown.items(), strict=True):
    cell.imshow(y[0, 0, 16:, 16:], cmap="gray", vmin=-2.5, vmax=2.5)
    cell.set_title(title, fontsize=9)
features = pixel_features(net, codes, 2).cropped((SIDE, SIDE))
tiles = features.tiles * features.values.sign()[:, None, None, None]
axes[1, 0].imshow(filter_grid(net.layer(1).filters, columns=4).permute(1, 2, 0))
right = plt.subplot(2, 4, (6, 8))
right.imshow(filter_grid(tiles, columns=11).permute(1, 2, 0))
axes[1, 0].set_title("filters of layer 1", fontsize=10)
right.set_title("features of layer 2, in pixels", fontsize=10)
for cell in (*axes.flat, right):
    cell.axis("off")
plt.show()
