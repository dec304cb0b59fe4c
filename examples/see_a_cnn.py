"""
What does a CNN look at?
========================

A small network learns to tell faces from other pictures. Its strongest activations are projected
down to the pixels that caused them: these maps respond to a dark eye below brighter skin. The
control is the same network with shuffled weights.
"""

import matplotlib.pyplot as plt
import skimage.data
import torch
from torch import nn

from deconvnet.visualization import Normalization, filter_grid, shuffled_control, strongest

STEPS, WIDTH, SIZE, FACES = 250, 12, 48, 7

torch.manual_seed(0)
pixels = torch.tensor(skimage.data.lfw_subset()).float()[:, None]  # 100 faces, then 100 others
pixels = nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bicubic").clamp(0, 1)
labels, (train, test) = (torch.arange(200) < 100).long(), torch.randperm(200).split([150, 50])
sizes = [(1, WIDTH, 7), (WIDTH, 2 * WIDTH, 5), (2 * WIDTH, 2 * WIDTH, 3)]
layers = []
for channels, maps, size in sizes:
    layers += [nn.Conv2d(channels, maps, size, padding=size // 2), nn.ReLU(), nn.MaxPool2d(2)]
side = SIZE // 8
model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(maps * side * side, 2))

# %%
# Training takes a few seconds. Pictures are shifted, mirrored, and changed in contrast.
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(STEPS):
    batch, shift = train[torch.randint(150, (32,))], torch.randint(-4, 5, (2,)).tolist()
    x = torch.roll(pixels[batch], shift, (2, 3)).flip(3 if step % 2 else 1) - 0.5
    x = x * (0.7 + 0.6 * torch.rand(32, 1, 1, 1)) + 0.2 * torch.randn(32, 1, 1, 1)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), labels[batch]).backward()
    optimizer.step()
accuracy = (model.eval()(pixels[test] - 0.5).argmax(1) == labels[test]).float().mean()
print(f"{accuracy:.0%} of the test pictures are classified correctly")

# %%
# Of the layer before the last pooling ("7"), two maps that respond most strongly to any face.
faces, grey = pixels[:100].expand(-1, 3, -1, -1), Normalization((0.5,), (1.0,), "grey")
control = shuffled_control(model, pixels[:50] - 0.5)
figure, axes = plt.subplots(6, 1, figsize=(7, 6.6), layout="constrained")
for row, (network, rank) in enumerate([(model, 0), (model, 1), (control, 0)]):
    above, below = axes[2 * row], axes[2 * row + 1]
    best = int(strongest(network, faces, "7", k=2, normalization=grey).units[rank, 1])
    found = strongest(network, faces, "7", k=FACES, map_index=best, normalization=grey)
    there = faces[found.units[:, 0]] - 0.5
    above.imshow(filter_grid(found.images, columns=FACES).permute(1, 2, 0))
    below.imshow(filter_grid(there, columns=FACES).permute(1, 2, 0))
    above.set_title(f"map {best}" if network is model else "a map of the control", fontsize=10)
for cell in axes:
    cell.axis("off")
plt.show()
