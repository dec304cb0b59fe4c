"""Do the features of a layer prefer a category of images, although no label was used in training?

    python benchmarks/categories.py runs/iccv2011-objects --images new

`new` is a folder with a folder of images for each category, which the network has not seen. For
every layer the table gives

- the number of features: maps, and where coefficients have both signs each sign of a map, that are
  active in at least --strongest images;
- the share of features whose --strongest (5) images are all of one category, and the same share
  if the categories of the images are shuffled. An image counts with the largest coefficient of the
  map, so a feature is not credited for several places of one image;
- how many images are nearest to their own category: each image is described by the square roots of
  these largest coefficients, scaled to unit length, and compared with the other images of each
  category by the mean of the products.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deconvnet import DataSettings, DeconvNet, load, load_images
from deconvnet.images.files import find_images
from deconvnet.monitoring.strict_json import to_json
from deconvnet.training.run_folder import training_data

BATCH = 10


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    data = training_data(options.run)
    if data is None:
        raise SystemExit(f"{options.run}: not the folder of a run of deconvnet train")
    files = find_images(options.images, key="--images")
    names = sorted({file.parent.name for file in files})
    categories = torch.tensor([names.index(file.parent.name) for file in files])
    if len(names) < 2 or categories.bincount().min() < options.strongest:
        raise SystemExit(
            f"--images={options.images}: must hold two or more folders of at least "
            f"{options.strongest} images"
        )
    maxima = layer_maxima(load(options.run).eval(), data, options.images)
    rows = [
        {"layer": number, **table_row(values, categories, options.strongest)}
        for number, values in enumerate(maxima, 1)
    ]
    print(f"{len(files)} images of {len(names)} categories: {', '.join(names)}\n")
    print("| layer | features | of one category | by chance | nearest to their own category |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['layer']} | {row['features']} | {row['of_one_category']:.0%} | "
            f"{row['by_chance']:.1%} | {row['nearest_to_own']:.0%} |"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "categories.json"
    path.write_text(to_json({"command": " ".join(sys.argv), "layers": rows}, indent=1))
    print(f"\n{path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--images", required=True, help="folder of folders of new images")
    parser.add_argument("--strongest", type=int, default=5, help="images of a feature (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (default 2)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/categories"))
    return parser.parse_args()


@torch.no_grad()
def layer_maxima(net: DeconvNet, data: DataSettings, path: str) -> list[Tensor]:
    """For each layer, (N, F): the largest coefficients of each feature in each image, in the order
    of the paths of the images, which are prepared as in training."""
    source = replace(data, source="folder", path=path, mask=None, max_images=None)
    loaded = load_images(source)
    maxima: list[list[Tensor]] = [[] for _ in range(net.depth)]
    for batch in torch.arange(len(loaded.images)).split(BATCH):
        frames = None if loaded.frames is None else loaded.frames[batch]
        codes = net.infer(loaded.images[batch], frames=frames)
        for number, collected in enumerate(maxima, 1):
            z = codes.layer(number).z.flatten(2)
            collected.append(torch.stack([z.amax(2), (-z).amax(2)], 2).flatten(1).clamp_min(0))
    return [torch.cat(collected) for collected in maxima]


def table_row(maxima: Tensor, categories: Tensor, strongest: int) -> dict[str, float]:
    """The figures of one layer, from maxima (N, F) and the categories (N,) of the images."""
    maxima = maxima[:, (maxima > 0).sum(0) >= strongest]
    images = maxima.topk(strongest, dim=0).indices
    draws = [torch.randperm(len(categories), generator=generator(n)) for n in range(100)]
    chance = [of_one_category(categories[order][images]) for order in draws]
    return {
        "features": maxima.shape[1],
        "of_one_category": of_one_category(categories[images]),
        "by_chance": sum(chance) / len(chance),
        "nearest_to_own": nearest_to_own(maxima, categories),
    }


def of_one_category(found: Tensor) -> float:
    """The share of the columns of (k, F) categories that are all equal."""
    return (found == found[0]).all(0).double().mean().item()


def nearest_to_own(maxima: Tensor, categories: Tensor) -> float:
    """The share of images whose most similar category, without the image itself, is their own."""
    described = torch.nn.functional.normalize(maxima.sqrt(), dim=1)
    similarity = (described @ described.T).fill_diagonal_(0)
    members = torch.nn.functional.one_hot(categories).to(similarity)
    means = similarity @ members / (members.sum(0) - members).clamp_min(1)
    return (means.argmax(1) == categories).double().mean().item()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    main()
