"""The ablation table of the README: one change at a time, one autoencoder, an independent judge.

    python tests/experiments/ablate.py runs/drawn --seeds 0 1 2 [--only ROW ...]

The autoencoder of the run makes the latents. For each row a denoiser is trained from nothing, with
each seed. 600 samples at 1, 2, 4 and 6 steps are shown to the judge (judge.py). Printed: its
Fréchet distance at each number of steps, and the share named as asked at 4 steps.
"""
import dataclasses
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch

from judge import Scores                                     # it adds the folder of the next
import sphere_latent as sl

ROWS = {
    "default": {},
    "consistency off": {"consistency_weight": 0.0},
    "latent consistency off": {"latent_consistency_weight": 0.0},
    "spherify off": {},                                      # below
    "logit-normal, mean 0": {"noise_mean": 0.0},
    "uniform angles": {"noise_distribution": "uniform"},
    "uniform tangent, 85 degrees": {"noise_distribution": "uniform-tangent", "max_angle": 85.0},
    "EMA off": {"ema_decay": 0.0},
    "small angle up to the large": {"small_ratio": 1.0},
    "guidance off": {"cfg_scale": 1.0},
    "guidance 2.5": {"cfg_scale": 2.5},
}


def train_denoiser(config, autoencoder, images):
    """The training loop of every run, without checkpoints and pictures. Returns the run."""
    sl.save_run = sl.progress_figures = lambda *unused: None
    torch.manual_seed(config.seed)
    denoiser = sl.denoiser_for(config, autoencoder.latent_shape, len(images.classes))
    return sl.fit(denoiser, autoencoder, images, config, folder=None)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run on the drawn flowers")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    given = parser.parse_args()
    start, autoencoder, _ = sl.load_run(given.run)
    images, held_out = sl.load_images(start, "train"), sl.load_images(start, "test")
    scores = Scores(images, held_out)
    labels = sl.balanced_labels(600, len(images.classes))
    spherify = sl.spherify
    for row in given.only:
        # the file's functions look the name up when they run
        sl.spherify = torch.Tensor.float if row == "spherify off" else spherify
        for seed in given.seeds:
            config = dataclasses.replace(start, train_steps=given.updates, seed=seed, **ROWS[row])
            run = train_denoiser(config, autoencoder, images)
            config.seed = 1234                               # all rows sample from the same noise
            found = {}
            for steps in sl.STEP_COUNTS:
                found[steps] = scores(sl.sample_images(run, labels, steps), labels)
            distances = "  ".join(f"{found[steps]['judge']:.4f}" for steps in found)
            print(f"{row:28} seed {seed}  {distances}  named {found[4]['named']:.3f}", flush=True)


if __name__ == "__main__":
    main()
