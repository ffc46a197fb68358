"""The ablation table of the README: one change at a time, several seeds, one shared autoencoder, an independent judge.

    python tests/ablate.py runs/drawn --updates 450 --seeds 0 1 2 [--only ROW ...]

The first word is a finished run on the drawn flowers: its autoencoder makes the latents. For each row a denoiser is trained from
nothing (rows that begin with "autoencoder" first train one of their own, which the seeds share); 600 samples at 1, 2, 4 and 6 steps
are shown to the judge (judge.py). Printed: the Frechet distance in the judge's features, in units of the variance of the held-out
drawings, and the share of samples given the asked class.
"""
import argparse
import dataclasses
import pathlib
import shutil
import sys
import tempfile

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from judge import judge_run, train_judge  # noqa: E402
import sphere_latent as sl  # noqa: E402

TRAINING = {
    "default": {},
    "consistency off": {"consistency_weight": 0.0},
    "latent consistency off": {"latent_consistency_weight": 0.0},
    "spherify off": {"spherify": False},
    "logit-normal, mean 0": {"noise_mean": 0.0},
    "logit-normal, deviation 2": {"noise_std": 2.0},
    "logit-normal, deviation 0.5": {"noise_std": 0.5},
    "uniform angles": {"noise_distribution": "uniform"},
    "uniform tangent (85 deg)": {"noise_distribution": "uniform-tangent", "max_angle": 85.0},
    "EMA off": {"ema_decay": 0.0},
    "target on the sphere": {"sphere_target": True},
    "small angle up to a quarter": {"small_ratio": 0.25},
    "small angle up to the large": {"small_ratio": 1.0},
    "autoencoder: 300 updates": {"autoencoder_steps": 300},
    "autoencoder: 16 channels": {"latent_channels": 16},
}
SAMPLING = {
    "1 step": {"steps": 1}, "2 steps": {"steps": 2}, "4 steps": {"steps": 4}, "6 steps": {"steps": 6},
    "2, shared noise": {"steps": 2, "fresh_noise": False},
    "4, shared noise": {"steps": 4, "fresh_noise": False},
    "4, shared noise, fixed 60": {"steps": 4, "fresh_noise": False, "tilt_schedule": "fixed", "tilt": 60.0},
    "4, fixed 60": {"steps": 4, "tilt_schedule": "fixed", "tilt": 60.0},
    "4, fixed 85": {"steps": 4, "tilt_schedule": "fixed", "tilt": 85.0},
    "4, no CFG": {"steps": 4, "cfg_scale": 1.0}, "4, CFG 2.5": {"steps": 4, "cfg_scale": 2.5},
    "1, no CFG": {"steps": 1, "cfg_scale": 1.0}, "1, CFG 2.5": {"steps": 1, "cfg_scale": 2.5},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("--updates", type=int, default=450)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=TRAINING, default=list(TRAINING), metavar="ROW")
    given = parser.parse_args()
    config, autoencoder, _ = sl.load_run(given.run)
    if config.method != "sphere-latent":
        sys.exit(f"{given.run} is of Sphere Encoder; the rows need a frozen autoencoder")
    config = dataclasses.replace(config, fresh_noise=sl.Config().fresh_noise, cfg_scale=sl.Config().cfg_scale)
    images, device = sl.load_images(config, "train"), torch.device("cpu")
    judge, right = train_judge(images, sl.load_images(config, "test"))
    print(f"judge: {right:.3f} of the held-out drawings right", flush=True)
    for row in given.only:
        coder = autoencoder
        if row.startswith("autoencoder"):                    # its own, one for all seeds
            folder = pathlib.Path(tempfile.mkdtemp())
            coder = sl.fit_autoencoder(dataclasses.replace(config, **TRAINING[row]), images,
                                       folder / "autoencoder.pt", device)
            shutil.rmtree(folder)
        for seed in given.seeds:
            changed = dataclasses.replace(config, train_steps=given.updates, seed=seed, save_every=10 ** 9, **TRAINING[row])
            folder = pathlib.Path(tempfile.mkdtemp())
            sl.fit_denoiser(changed, images, coder, folder / "checkpoint.pt", device)
            sampling = SAMPLING if row == "default" else dict(list(SAMPLING.items())[:4])
            for name, (share, distance) in judge_run(judge, folder, 600, sampling).items():
                print(f"{row} | seed {seed} | {name} | {distance:.4f} | {share:.3f}", flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
