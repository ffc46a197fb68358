"""Draw the method in one figure, with decoded pictures of a finished run on the drawn flowers.

    python tests/experiments/method_figure.py RUN [--out assets/method.png]

In both panels a quarter of a circle on the sphere: v at 0 degrees (up), noise e at 90 (right). The
angles are true. Points inside the circle lie where there is room. The class and the seed were
chosen for clear pictures. Coordinates are pixels from the centre of the sphere.
"""
import math
import pathlib
import sys
from argparse import ArgumentParser

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import sphere_latent as sl  # noqa: E402

NAME, SEED, SMALL, LARGE = "daisy", 4, 33, 69                                # angles in degrees
TILTS = [90 * (1 - k / 4) ** 0.7 for k in range(4)]                          # as in sl.sample
WIDTH, HEIGHT, RADIUS = 1660, 880, 545
INK, GREY, DENOISE, TILT, LOSS = "#222222", "#777777", "#1463b0", "#b85600", "#b3126b"
CODE = {"family": "DejaVu Sans Mono", "size": 21}


@torch.no_grad()
def pictures_of(run):
    """Two lists of images [H, W, 3]: those of the training panel, those of the sampling panel."""
    config, autoencoder, denoiser = run
    images = sl.load_images(config, "train")
    label = sl.class_number(NAME, denoiser.classes)
    x = images[(images.labels == label).nonzero()[SEED].item()][0][None]     # [1, 3, H, W]
    label, generator = torch.tensor([label]), torch.Generator().manual_seed(SEED)
    e = torch.randn(1, *denoiser.latent_shape, generator=generator)          # [1, N, C]
    v = sl.spherify(autoencoder.encode(x))
    noisy = [sl.noisy_spherify(v, e, math.radians(angle)) for angle in (SMALL, LARGE, 90)]
    answers = [denoiser(point, label) for point in noisy[:2]]
    _, path = sl.sample(denoiser, label, 4, config.cfg_scale, generator=generator, return_path=True)
    decoded = autoencoder.decode(torch.cat([*noisy, *answers, *path]))
    pictures = torch.cat([x, decoded]).permute(0, 2, 3, 1)
    return pictures[:6], pictures[6:]


def at(degrees, radius=RADIUS):
    return radius * math.sin(math.radians(degrees)), radius * math.cos(math.radians(degrees))


def write(panel, x, y, text, colour=INK, **options):
    options = {"ha": "center", "va": "center", "size": 25, **options}
    panel.text(x, y, text, color=colour, **options)


def dot(panel, x, y, colour=INK, number=""):
    panel.plot(x, y, "o", color=colour, ms=36 if number else 14, zorder=5)
    write(panel, x, y - 1, number, "white", size=24, weight="bold", zorder=6)


def show(panel, image, x, y, colour=INK, caption="", side=104):
    frame = panel.inset_axes((x - side / 2, y - side / 2, side, side), transform=panel.transData)
    frame.imshow(image, interpolation="bicubic")
    frame.set(xticks=[], yticks=[])
    frame.spines[:].set(color=colour, linewidth=3)
    write(panel, x, y - side / 2 - 22, caption)


def arrow(panel, *points, colour=INK, name="", aside=22):
    """An arrow along points. The name of its function stands beside its first part."""
    panel.add_patch(FancyArrowPatch(path=Path(points), color=colour, fill=False, lw=3.5, zorder=2,
                                    arrowstyle="-|>", mutation_scale=26))
    (x, y), (x2, y2) = points[:2]
    slope = 90 - (90 - math.degrees(math.atan2(y2 - y, x2 - x))) % 180       # -90 < slope <= 90
    right, up = at(-slope, aside)
    write(panel, (x + x2) / 2 + right, (y + y2) / 2 + up, name, colour, rotation=slope, **CODE)


def noisy_point(panel, angle, image, text, bulge=0, room=80):
    """An arrow from v to a point of the circle, and its picture. A bulge keeps arrows apart."""
    turns = [k / 200 for k in range(199)]
    arrow(panel, *[at(angle * t, RADIUS + bulge * (1 - (2 * t - 1) ** 4)) for t in turns],
          colour=TILT)
    dot(panel, *at(angle), TILT)
    show(panel, image, *at(angle, RADIUS + room), TILT)
    write(panel, *at(angle - 9.5, RADIUS + room - 30), text, TILT)


def new_panel(figure, left, width, title, function):
    panel = figure.add_axes((left / WIDTH, 0, width / WIDTH, 1))
    panel.set(xlim=(-175, width - 175), ylim=(-180, HEIGHT - 180), autoscale_on=False)
    panel.axis("off")
    panel.plot([0, 0, RADIUS], [RADIUS, 0, 0], color="#cccccc", lw=2)
    panel.plot(*zip(*[at(degrees) for degrees in range(91)]), color=GREY, lw=4)
    write(panel, -150, 655, title, ha="left", size=34, weight="bold")
    write(panel, 45, 653, function, GREY, ha="left", **CODE)
    write(panel, 130, 608, "noisy_spherify", TILT, **CODE)
    return panel


def training_panel(panel, image, v_small, v_large, noise, z_hat_small, z_hat_large):
    show(panel, image, -90, 160, caption="picture")
    arrow(panel, (-90, 216), (-90, 370), (-10, 370), name="encode")
    arrow(panel, (0, 370), (0, RADIUS - 8), name="spherify")
    for x, y, text in ((0, 370, "$z$"), (0, RADIUS, "$v$"), (RADIUS, 0, "$e$")):
        dot(panel, x, y)
        write(panel, x + 24, y + 26, text, size=29)
    noisy_point(panel, SMALL, v_small, "$v_{small}$")
    noisy_point(panel, LARGE, v_large, "$v_{large}$")
    show(panel, noise, RADIUS, -75, caption="noise")
    show(panel, z_hat_small, 142, 370, DENOISE)
    write(panel, 242, 336, r"$\hat z_{small}$", DENOISE)
    arrow(panel, at(SMALL, RADIUS - 10), (200, 390), colour=DENOISE, name="denoiser", aside=-22)
    show(panel, z_hat_large, 167, 186, DENOISE)
    write(panel, 267, 152, r"$\hat z_{large}$", DENOISE)
    arrow(panel, at(LARGE, RADIUS - 10), (225, 186), colour=DENOISE, name="denoiser")
    arrow(panel, (86, 370), (10, 370), colour=LOSS)
    arrow(panel, (167, 242), (147, 314), colour=LOSS)
    write(panel, 188, 288, "held fixed", LOSS, ha="left", size=22)
    arrow(panel, *[at(degrees, 130) for degrees in range(42, 3, -1)], colour=LOSS)
    panel.plot([0, 167], [0, 186], "--", color=LOSS, lw=2, zorder=1)
    losses = (("reconstruction_loss", r"$\hat z_{small} \to z$", (50, 370)),
              ("consistency_loss", r"$\hat z_{large} \to$ fixed $\hat z_{small}$", (156, 279)),
              ("latent_consistency_loss", r"direction of $\hat z_{large} \to v$", at(23, 130)))
    for number, (function, goal, place) in enumerate(losses, 1):
        y = -9 - 46 * number
        dot(panel, *place, LOSS, str(number))
        dot(panel, -125, y, LOSS, str(number))
        write(panel, -95, y, function, LOSS, ha="left", **CODE)
        write(panel, 215, y, goal, LOSS, ha="left", size=23)


def sampling_panel(panel, path):
    show(panel, path[0], RADIUS, -75, TILT, "random point")
    dot(panel, RADIUS, 0, TILT)
    for k, height in enumerate((60, 178, 296, 430)):
        arrow(panel, at(TILTS[k]), (10, height), colour=DENOISE, name=f"{k + 1} denoiser")
        dot(panel, 0, height, DENOISE)
        if k < 3:
            show(panel, path[2 * k + 1], -72, height, DENOISE)
            noisy_point(panel, TILTS[k + 1], path[2 * k + 2], f"{TILTS[k + 1]:.0f}°", 45 - 15 * k,
                        124 if k else 96)
    panel.plot([0, 0], [60, 296], color=INK, lw=3.5)
    arrow(panel, (0, 296), (0, 430), (0, RADIUS - 8), name="spherify", aside=-22)
    dot(panel, 0, RADIUS)
    arrow(panel, (-8, 430), (-85, 430), (-85, 490), name="decode", aside=-22)
    show(panel, path[-1], -85, 560, side=130)
    write(panel, -150, -101, "Start at a random point.\nDenoise, tilt back by less each time.\n"
          "Decode the last answer.", ha="left", linespacing=1.6)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a finished run")
    parser.add_argument("--out", default=ROOT / "assets" / "method.png")
    given = parser.parse_args()
    training, sampling = pictures_of(sl.load_run(given.run))
    figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=72, facecolor="none")     # a point is a pixel
    figure.add_artist(FancyBboxPatch((0, 0), WIDTH, HEIGHT, "round,pad=0,rounding_size=30",
                                     color="#fdfdfb", transform=None, zorder=-1))
    training_panel(new_panel(figure, 0, 810, "Training", "sphere_losses"), *training)
    sampling_panel(new_panel(figure, 810, 850, "Sampling", "sample"), sampling)
    figure.savefig(given.out)
    # 64 levels of each colour instead of 256: half the bytes
    Image.eval(Image.open(given.out), lambda level: level // 4 * 85 // 21).save(given.out)


if __name__ == "__main__":
    main()
