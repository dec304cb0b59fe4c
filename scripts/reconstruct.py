"""Reconstruct images from the feature maps of a trained network:

python scripts/reconstruct.py run=runs/photographs layer=2 images=photo.jpg
"""

import os
import signal
from pathlib import Path

import hydra
from omegaconf import DictConfig
from tqdm import tqdm

# With another busy process on the machine, threads of OpenMP that spin while they wait cost up to
# ten times the time; on a quiet machine a short spin is as fast. To be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Ctrl-C while libraries are loaded ends the program without a word; `launch` has more to say.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from deconvnet import config, load
from deconvnet.applications.pictures import check_targets
from deconvnet.data import distinct_names, image_files, read_image
from deconvnet.monitor import hidden, save_picture
from deconvnet.network import snr
from deconvnet.visualization import parts_picture

config.register()


@hydra.main(version_base="1.3", config_path="../configs", config_name="reconstruct")
def main(cfg: DictConfig) -> None:
    with config.one_line_errors(ValueError, OSError):
        reconstruct(config.read_command(cfg))


def reconstruct(cfg: config.ReconstructConfig) -> None:
    source = Path(str(cfg.run))
    net = load(source).to(config.device(cfg.device))
    layer = net.depth if cfg.layer is None else cfg.layer
    net.layer(layer)
    paths = image_files(cfg.images)
    beside = source if source.is_dir() else source.parent
    folder = Path(str(cfg.output or beside / "reconstructions")).expanduser()
    named = list(zip(paths, distinct_names(paths), strict=True))
    endings = [".png", "-parts.png"] if cfg.parts else [".png"]
    targets = [folder / f"{name}-layer{layer}{end}" for _, name in named for end in endings]
    check_targets(targets, [source, *paths])
    for path, name in tqdm(named, unit="image", leave=False, disable=hidden(len(paths) > 1)):
        image = read_image(path)[None].to(net.device)
        codes = net.infer(image, depth=layer)
        pixels = net.reconstruct(codes)
        if cfg.parts:
            picture = parts_picture(net, codes, image[0], layer)
            save_picture(folder / f"{name}-layer{layer}-parts.png", picture)
        target = folder / f"{name}-layer{layer}.png"
        save_picture(target, pixels[0])
        shown = image if pixels.shape[1] == 3 else image.mean(1, keepdim=True)
        tqdm.write(
            f"{target}   layer {layer}: {net.snr(codes, layer):.2f} dB preprocessed, "
            f"{snr(shown, pixels):.2f} dB in pixels, {codes.layer(layer).density:.2%} of z not zero"
        )


if __name__ == "__main__":
    config.launch(main, config.ReconstructConfig)
