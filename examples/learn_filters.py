"""
Learn filters from photographs
==============================

Convolutional dictionary learning finds the patterns of which images are made: here edges, lines,
curves and spots, many of them coloured, from five photographs and nothing else.
"""

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
from skimage.filters import gaussian
from skimage.transform import rescale
from sklearn.datasets import load_sample_images

from deconvnet import LearningSettings, learn_filters
from deconvnet.visualization import filter_grid

NUM_FILTERS, EPOCHS, SIDE = 48, 20, 144

# %%
# The middle of five photographs at half their size. A sum of small filters represents slow changes
# of brightness poorly, so these are removed first. Images are (N, C, H, W).
astronaut, cat, cup = skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()
crops = []
for photograph in [astronaut, cat, cup, *load_sample_images().images]:
    small = rescale(photograph / 255, 0.5, channel_axis=2, anti_aliasing=True)
    top, left = ((side - SIDE) // 2 for side in small.shape[:2])
    crops.append(small[top : top + SIDE, left : left + SIDE])
crops = np.stack(crops).astype(np.float32)
detail = np.stack([crop - gaussian(crop, 3, channel_axis=2) for crop in crops])
images = (detail / detail.std((1, 2, 3), keepdims=True)).transpose(0, 3, 1, 2)

# %%
# ``lam_ratio`` sets how sparse the codes are: a coefficient stays zero unless its filter correlates
# with the image by more than this fraction of the largest correlation anywhere.
learning = LearningSettings(epochs=EPOCHS, batch_size=None)
learned = learn_filters(images, NUM_FILTERS, 11, lam_ratio=0.03, learning=learning)
code = learned.encode(images)
density = float((code.z != 0).float().mean())
error = float(code.residual.square().sum() / np.square(images).sum())
print(f"{density:.2%} of the coefficients are not zero and explain {1 - error:.0%} of the detail")

# %%
# Each filter is drawn with its own contrast; grey is zero.
figure, (above, below) = plt.subplots(
    2, 1, figsize=(9, 5.6), height_ratios=[1, 1.75], layout="constrained"
)
above.imshow(np.hstack(crops))
above.set_title("five photographs")
below.imshow(filter_grid(learned.filters, columns=12).permute(1, 2, 0))
below.set_title(f"{NUM_FILTERS} filters of 11x11 pixels, learned from them")
for axes in (above, below):
    axes.axis("off")
plt.show()
