"""
Fill in missing pixels
======================

Half of the pixels are missing. A mask leaves them out, so filters are learned from the other half
of this one picture, and the code that explains the visible pixels also paints the missing ones.
"""

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
from skimage.filters import gaussian
from skimage.metrics import peak_signal_noise_ratio as psnr
from skimage.restoration import inpaint_biharmonic
from skimage.transform import rescale

from deconvnet import LearningSettings, learn_filters
from deconvnet.operators.convolution import deconvolve
from deconvnet.visualization import filter_grid

NUM_FILTERS, EPOCHS, SIDE, MISSING = 36, 10, 256, 0.5

wall = rescale(skimage.data.brick() / 255, 0.5, anti_aliasing=True)[:SIDE, :SIDE]
seen = np.random.default_rng(0).random(wall.shape) > MISSING
damaged = np.where(seen, wall, np.nan)

# %%
# Slow changes are not what filters explain. Here they are the local mean of the pixels seen.
slow = gaussian(np.where(seen, wall, 0), 3) / gaussian(seen.astype(float), 3)
detail = (damaged - slow).astype(np.float32)[None, None]
mask = seen.astype(np.float32)[None, None]

# %%
# With a mask, images may have any value, even NaN, where it is zero.
learning = LearningSettings(epochs=EPOCHS, batch_size=None)
learned = learn_filters(detail, NUM_FILTERS, 8, lam_ratio=0.004, mask=mask, learning=learning)
painted = deconvolve(learned.encode(detail, mask=mask).z, learned.filters)[0, 0].numpy()
filled = np.where(seen, wall, slow + painted)
smooth = inpaint_biharmonic(np.where(seen, wall, 0), ~seen)
ours, theirs = (psnr(wall, image, data_range=1) for image in (filled, smooth))
print(f"PSNR: {ours:.1f} dB; biharmonic interpolation {theirs:.1f} dB")

# %%
# Repeated texture is where learned filters help. On smooth photographs, interpolation is as good.
figure, axes = plt.subplots(1, 5, figsize=(11, 2.6), layout="constrained")
axes[1].imshow(filter_grid(learned.filters, columns=6).permute(1, 2, 0))
axes[1].set_title("filters learned from it")
pictures = {
    f"{MISSING:.0%} missing (red)": damaged,
    f"filled in: {ours:.1f} dB": filled,
    f"biharmonic: {theirs:.1f} dB": smooth,
    "the picture": wall,
}
for cell, (title, picture) in zip(axes[[0, 2, 3, 4]], pictures.items(), strict=True):
    cell.imshow(picture[-128:, -128:], cmap="gray", vmin=wall.min(), vmax=wall.max())
    cell.set_title(title)
for cell in axes:
    cell.set(xticks=[], yticks=[], facecolor="tab:red")
plt.show()
