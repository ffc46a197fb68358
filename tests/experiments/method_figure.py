"""Draw the method in one figure, with decoded pictures of a finished run on the drawn flowers.

    python tests/experiments/method_figure.py RUN [--out assets/method.png]

Each panel is a quarter of a circle on the sphere, v at 0 degrees (up), noise at 90 (right). Angles
are true; points inside the circle lie where there is room. Coordinates are pixels from its centre.
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import sphere_latent as sl  # noqa: E402

NAME, SEED, SMALL, LARGE = "daisy", 4, 33, 69                # angles in degrees
TILTS = [90 * (1 - k / 4) ** 0.7 for k in range(4)]          # as in sl.sample
WIDTH, HEIGHT, RADIUS = 1660, 880, 545
INK, GREY, DENOISE, TILT, LOSS = "#222222", "#777777", "#1463b0", "#b85600", "#b3126b"
CODE = {"family": "DejaVu Sans Mono", "size": 21}


def pictures_of(run):
    """Images [H, W, 3]: six for the training panel, eight for the sampling panel."""
    config, autoencoder, denoiser = run
    images = sl.load_images(config, "train")
    label = torch.tensor([denoiser.classes.index(NAME)])
    x = images[(images.labels == label).nonzero()[SEED].item()][0][None]     # [1, 3, H, W]
    v = sl.spherify(autoencoder.encode(x))                                   # [1, N, C]
    generator = torch.Generator().manual_seed(SEED)
    e = torch.randn(v.shape, generator=generator)
    noisy = [sl.noisy_spherify(v, e, math.radians(angle)) for angle in (SMALL, LARGE, 90)]
    answers = [denoiser(point, label) for point in noisy[:2]]
    _, path = sl.sample(denoiser, label, 4, config.cfg_scale, generator=generator, return_path=True)
    decoded = autoencoder.decode(torch.cat([*noisy, *answers, *path]))
    return torch.cat([x, decoded]).permute(0, 2, 3, 1).split([6, 8])


def at(degrees, radius=RADIUS):
    return radius * math.sin(math.radians(degrees)), radius * math.cos(math.radians(degrees))


def write(panel, x, y, text, colour=INK, **options):
    panel.text(x, y, text, color=colour, **{"ha": "center", "va": "center", "size": 25, **options})


def show(panel, image, x, y, colour=INK, caption="", side=104):
    half = side / 2
    panel.imshow(image, extent=(x - half, x + half, y - half, y + half), aspect="auto")
    panel.plot(x, y, "s", ms=side, mfc="none", mec=colour, mew=3)
    write(panel, x, y - half - 22, caption)


def arrow(panel, points, colour=INK, name="", aside=22):
    """An arrow along points. The name of its function stands beside its first part."""
    panel.add_patch(FancyArrowPatch(path=Path(points), color=colour, fill=False, lw=3.5,
                                    arrowstyle="-|>", mutation_scale=26))
    (x, y), (x2, y2) = points[:2]
    slope = 90 - (90 - math.degrees(math.atan2(y2 - y, x2 - x))) % 180       # -90 < slope <= 90
    right, up = at(-slope, aside)
    write(panel, (x + x2) / 2 + right, (y + y2) / 2 + up, name, colour, rotation=slope, **CODE)


def noisy_point(panel, angle, image, text, bulge=0, room=80):
    """An arrow from v to a point of the circle, and its picture. A bulge keeps arrows apart."""
    turns = [k / 200 for k in range(199)]
    arrow(panel, [at(angle * t, RADIUS + bulge * (1 - (2 * t - 1) ** 4)) for t in turns], TILT)
    panel.plot(*at(angle), "o", color=TILT, ms=14)
    show(panel, image, *at(angle, RADIUS + room), TILT)
    write(panel, *at(angle - 9.5, RADIUS + room - 30), text, TILT)


def training_panel(panel, image, v_small, v_large, noise, z_hat_small, z_hat_large):
    show(panel, image, -90, 160, caption="picture")
    arrow(panel, [(-90, 216), (-90, 370), (-10, 370)], name="encode")
    arrow(panel, [(0, 370), (0, RADIUS - 8)], name="spherify")
    for x, y, text in ((0, 370, "$z$"), (0, RADIUS, "$v$"), (RADIUS, 0, "$e$")):
        panel.plot(x, y, "o", color=INK, ms=14)
        write(panel, x + 24, y + 26, text, size=29)
    noisy_point(panel, SMALL, v_small, "$v_{small}$")
    noisy_point(panel, LARGE, v_large, "$v_{large}$")
    show(panel, noise, RADIUS, -75, caption="one $e$ for both")
    show(panel, z_hat_small, 142, 370, DENOISE)
    write(panel, 242, 336, r"$\hat z_{small}$", DENOISE)
    arrow(panel, [at(SMALL, RADIUS - 10), (200, 390)], DENOISE, "denoiser", -22)
    show(panel, z_hat_large, 167, 186, DENOISE)
    write(panel, 267, 152, r"$\hat z_{large}$", DENOISE)
    arrow(panel, [at(LARGE, RADIUS - 10), (225, 186)], DENOISE, "denoiser")
    arrow(panel, [(86, 370), (10, 370)], LOSS)
    arrow(panel, [(167, 242), (147, 314)], LOSS)
    write(panel, 188, 288, r"$\hat z_{small}$ held fixed", LOSS, ha="left", size=22)
    arrow(panel, [at(degrees, 130) for degrees in range(42, 3, -1)], LOSS)
    panel.plot([0, 120], [0, 133], "--", color=LOSS, lw=2)
    losses = (("reconstruction_loss", r"$\hat z_{small} \to z$", (50, 370)),
              ("consistency_loss", r"$\hat z_{large} \to$ fixed $\hat z_{small}$", (156, 279)),
              ("latent_consistency_loss", r"$\hat z_{large}$ points along $v$", at(23, 130)))
    for number, (function, goal, place) in enumerate(losses, 1):
        height = -9 - 46 * number
        write(panel, -95, height, function, LOSS, ha="left", **CODE)
        write(panel, 215, height, goal, LOSS, ha="left", size=23)
        for x, y in (place, (-125, height)):
            panel.plot(x, y, "o", color=LOSS, ms=36)
            write(panel, x, y - 1, number, "white", size=24, weight="bold")


def sampling_panel(panel, *path):
    show(panel, path[0], RADIUS, -75, TILT, "random point")
    for k, height in enumerate((60, 178, 296, 430)):
        arrow(panel, [at(TILTS[k]), (10, height)], DENOISE, f"denoiser, pass {k + 1}")
        panel.plot(0, height, "o", color=DENOISE, ms=14)
    for k, bulge, room in ((1, 45, 96), (2, 30, 124), (3, 15, 124)):
        show(panel, path[2 * k - 1], -72, 118 * k - 58, DENOISE)
        noisy_point(panel, TILTS[k], path[2 * k], f"{TILTS[k]:.0f}°", bulge, room)
    panel.plot([0, 0], [60, 296], color=INK, lw=3.5, zorder=1)
    arrow(panel, [(0, 296), (0, 430), (0, RADIUS - 8)], name="spherify", aside=-22)
    panel.plot([0, RADIUS], [RADIUS, 0], "o", color=INK, ms=14)
    arrow(panel, [(-8, 430), (-85, 430), (-85, 490)], name="decode", aside=-22)
    show(panel, path[-1], -85, 560, side=130)
    write(panel, -150, -101, "Start at a random point. Then, in turn: denoise,\n"
          "spherify (a new $v$), tilt back into noise by less.\nDecode the last answer.", ha="left", linespacing=1.77)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a finished run")
    parser.add_argument("--out", default="assets/method.png", help="the picture to write")
    given = parser.parse_args()
    pictures = pictures_of(sl.load_run(given.run))
    figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=72, facecolor="none")     # a point is a pixel
    figure.add_artist(FancyBboxPatch((0, 0), WIDTH, HEIGHT, "round,pad=0,rounding_size=30",
                                     color="white", transform=None, zorder=-1))
    for k, (title, function) in enumerate((("Training", "sphere_losses"), ("Sampling", "sample"))):
        panel = figure.add_axes((k * 810 / WIDTH, 0, 850 / WIDTH, 1))
        panel.set(xlim=(-175, 675), ylim=(-180, HEIGHT - 180), autoscale_on=False)
        panel.axis("off")
        panel.plot([0, 0, RADIUS], [RADIUS, 0, 0], color="#cccccc", lw=2, zorder=0)
        panel.plot(*zip(*[at(degrees) for degrees in range(91)]), color=GREY, lw=4, zorder=0)
        write(panel, 470, 70, "sphere", GREY)
        write(panel, -150, 655, title, ha="left", size=34, weight="bold")
        write(panel, 45, 653, function, GREY, ha="left", **CODE)
        write(panel, 130, 608, "noisy_spherify", TILT, **CODE)
        (training_panel, sampling_panel)[k](panel, *pictures[k])
    figure.savefig(given.out)
    Image.eval(Image.open(given.out), lambda c: c // 4 * 85 // 21).save(given.out)  # fewer bytes
