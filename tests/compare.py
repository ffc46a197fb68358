"""Runs side by side, Sphere Latent Encoder and Sphere Encoder among them: what an image costs and how good it is.

    python tests/compare.py RUN [RUN ...] [--cfg-scale 1.5] [--samples 600] [--out compare.png]

All runs must have learned the drawn flowers. Printed for 1, 2, 4 and 6 steps: parameters, FLOPs an image (torch's
FlopCounterMode, 2 operations a multiply-add, decoding included), milliseconds an image (batches of 50, the runs take turns
in one process, best of three), and, from the same noise for all, the share of samples that an independent judge (judge.py)
names as asked and their Frechet distance to held-out drawings in two feature spaces that belong to no run: the judge's,
learned from drawings alone, and an untrained network's, learned from nothing. --out gets the first samples of each.
"""
import argparse
import dataclasses
import pathlib
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from judge import accuracy, judge_features, train_judge  # noqa: E402
import sphere_latent as sl  # noqa: E402

STEPS = (1, 2, 4, 6)


def distance(features, images, reference):
    """Frechet distance of two sets of images, in units of the variance of the second."""
    (mean_a, cov_a), (mean_b, cov_b) = (
        (f.mean(0), torch.cov(f.T)) for f in (torch.cat([features(x) for x in batch.split(100)]).double()
                                              for batch in (images, reference)))
    return sl.frechet_distance(mean_a, cov_a, mean_b, cov_b) / float(cov_b.trace())


def compare(runs, judge, held_out, samples=600, timed=50):
    """runs {name: (config, autoencoder, denoiser)} -> rows (dicts), {row name: first 12 images}."""
    labels, real, timed = torch.arange(samples) % len(held_out.classes), held_out.pixels / 255, min(timed, samples)
    jobs = {(name, steps): (denoiser, autoencoder, dataclasses.replace(config, steps=steps))
            for name, (config, autoencoder, denoiser) in runs.items() for steps in STEPS}
    seconds = {job: [] for job in jobs}
    for _ in range(3):
        for job, (denoiser, autoencoder, config) in jobs.items():
            began = time.perf_counter()
            sl.sample_images(denoiser, autoencoder, labels[:timed], config)
            seconds[job].append((time.perf_counter() - began) / timed)
    rows, sheets = [], {}
    for (name, steps), (denoiser, autoencoder, config) in jobs.items():
        with FlopCounterMode(display=False) as counter:
            sl.sample_images(denoiser, autoencoder, labels[:1], config)
        images = sl.sample_images(denoiser, autoencoder, labels, config)
        rows.append({"run": name, "steps": steps, "GFLOPs": counter.get_total_flops() / 1e9,
                     "parameters": sum(p.numel() for model in {autoencoder, denoiser} for p in model.parameters()),
                     "ms": 1000 * min(seconds[name, steps]), "as asked": accuracy(judge, images, labels),
                     "judge": distance(lambda x: judge_features(judge, x), images, real),
                     "untrained": distance(sl.untrained_features, images, real)})
        sheets[f"{pathlib.Path(name).name}: {steps}"] = images[:12]
    return rows, sheets


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+")
    parser.add_argument("--cfg-scale", type=float, help="default: what each run has")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--out", default="compare.png")
    given, runs = parser.parse_args(), {}
    for name in given.run:
        try:
            config, *models = sl.load_run(name)
        except (sl.UserError, OSError) as error:
            sys.exit(f"{name}: {error}")
        scale = config.cfg_scale if given.cfg_scale is None else given.cfg_scale
        runs[name] = dataclasses.replace(config, cfg_scale=scale, seed=1234), *models
    if given.samples < 12:
        sys.exit(f"--samples {given.samples}: at least 12, one for each column of the figure")
    if {(c.dataset, c.image_size) for c, *_ in runs.values()} != {("drawn", config.image_size)}:
        sys.exit("these runs have not learned the same images, drawn flowers of one size")
    held_out = sl.load_images(config, "test")
    torch.manual_seed(0)
    judge, right = train_judge(sl.load_images(config, "train"), held_out)
    print(f"judge: {right:.3f} of held-out drawings right")
    rows, sheets = compare(runs, judge, held_out, given.samples)
    print(f"{'run':24} steps  parameters   GFLOPs  ms/image  as asked  Frechet distance: judge's, untrained features")
    for row in rows:
        print("{run:24} {steps:5} {parameters:11,} {GFLOPs:8.3f} {ms:9.2f} {as asked:9.3f} {judge:16.4f} {untrained:10.4f}"
              .format(**row))
    sl.picture(given.out, [*sheets.values()], [*sheets], [held_out.classes[y] for y in range(12)])


if __name__ == "__main__":
    main()
