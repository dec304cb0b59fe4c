"""
How sparse should a code be?
============================

The weight lambda trades the number of non-zero coefficients against the error of the
reconstruction. ``regularization_path`` codes one image for many lambdas, each from the one before.
"""

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
from skimage.filters import gaussian
from skimage.transform import rescale

import deconvnet
from deconvnet.operators.convolution import deconvolve

NUM_FILTERS, EPOCHS, SIDE, LAMS = 32, 10, 256, 16

# %%
# The filters come from the cat, the image to code is the camera man. Slow changes are removed.
cat = rescale(skimage.data.chelsea()[..., 1] / 255, 0.5, anti_aliasing=True)
camera = rescale(skimage.data.camera() / 255, 0.5, anti_aliasing=True)[:SIDE, :SIDE]
training, image = (
    (photograph - gaussian(photograph, 4)).astype(np.float32)[None, None]
    for photograph in (cat, camera)
)
learning = deconvnet.LearningSettings(epochs=EPOCHS, batch_size=None)
learned = deconvnet.learn_filters(training, NUM_FILTERS, 9, lam_ratio=0.03, learning=learning)

# %%
# ``path.snr`` is 10 log10 of the energy of the image over that of the error, in dB.
path = deconvnet.regularization_path(
    image, learned.filters, num_lams=LAMS, smallest_ratio=0.01, events=True
)
snr, per_pixel = path.snr[:, 0].numpy(), path.non_zeros[:, 0].numpy() / camera.size
chosen = [int(np.abs(per_pixel - target).argmin()) for target in (0.02, 0.1, 0.5)]
for n in chosen:
    print(f"{per_pixel[n]:.2f} coefficients per pixel: {snr[n]:.1f} dB")

# %%
# Each picture is the sum of the filters at their coefficients, with the slow changes added again.
grid = ["curve"] * 4, ["a", "b", "c", "image"]
figure, axes = plt.subplot_mosaic(
    grid, figsize=(9, 5.2), height_ratios=[1, 1.35], layout="constrained"
)
axes["curve"].semilogx(per_pixel, snr, ".-", color="#666666")
axes["curve"].set(xlabel="non-zero coefficients per pixel", ylabel="SNR of the detail (dB)")
axes["curve"].set_xlim(left=1e-3)
for name, n, color in zip("abc", chosen, ["C3", "C1", "C0"], strict=True):
    axes["curve"].plot(per_pixel[n], snr[n], "o", color=color, markersize=10)
    painted = deconvolve(path.events[n].maps(), learned.filters)[0, 0].numpy()
    axes[name].imshow(gaussian(camera, 4) + painted, cmap="gray", vmin=0, vmax=1)
    axes[name].set_title(f"{per_pixel[n]:.2f} per pixel: {snr[n]:.1f} dB", fontsize=10, color=color)
    axes[name].axis("off")
axes["image"].imshow(camera, cmap="gray", vmin=0, vmax=1)
axes["image"].set_title("the image", fontsize=10)
axes["image"].axis("off")
plt.show()
