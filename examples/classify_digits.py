"""
Features for a classifier
=========================

The digits lie at random places, so no pixel has a fixed meaning, and a linear classifier can do
little with pixels. Filters respond to a stroke wherever it is: how strongly each responds
identifies the digit.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler

from deconvnet.sklearn import DeconvNetTransformer
from deconvnet.visualization import filter_grid

DIGITS, NUM_MAPS, EPOCHS = 1200, 48, 4

random = np.random.default_rng(0)
digits, labels = load_digits(return_X_y=True)
chosen = random.permutation(len(digits))[:DIGITS]
digits, labels = digits[chosen].reshape(-1, 8, 8), labels[chosen]
images = np.zeros((DIGITS, 14, 14))
for image, digit, (i, j) in zip(images, digits, random.integers(0, 7, (DIGITS, 2)), strict=True):
    image[i : i + 8, j : j + 8] = digit
training, test = slice(DIGITS * 2 // 3), slice(DIGITS * 2 // 3, None)

# %%
# ``grid=2`` pools each map over four quarters of the image.
pixels = make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=1000))
features = make_pipeline(
    DeconvNetTransformer(num_maps=NUM_MAPS, filter_size=5, epochs=EPOCHS, grid=1),
    FunctionTransformer(np.sqrt),
    MaxAbsScaler(),
    LogisticRegression(C=10, max_iter=1000),
)
rows = images.reshape(DIGITS, -1)
pixels.fit(rows[training], labels[training])
features.fit(images[training], labels[training])
scores = pixels.score(rows[test], labels[test]), features.score(images[test], labels[test])
print("test accuracy: pixels {:.1%}, features {:.1%}".format(*scores))

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
axes[0].imshow(np.block([list(images[i : i + 6]) for i in range(0, 36, 6)]), cmap="gray_r")
axes[0].set_title("digits")
axes[1].imshow(filter_grid(features[0].net_.layer(1).filters, columns=7).permute(1, 2, 0))
axes[1].set_title(f"{NUM_MAPS} learned filters")
ConfusionMatrixDisplay.from_predictions(
    labels[test], features.predict(images[test]), ax=axes[2], colorbar=False, cmap="Blues"
)
axes[2].set_title("test digits: {1:.0%} (pixels: {0:.0%})".format(*scores))
for cell in axes[:2]:
    cell.axis("off")
plt.show()
