"""Few against many: Sphere Latent Encoder against plain flow matching on the same latents.

    python tests/experiments/flow.py runs/drawn --updates 1000 --seeds 0 1 2

Both train the same transformer on the same latents of the run's autoencoder, with as many updates
and noisy views, the same optimizer and moving average. The flow mixes z and noise on a straight
line, x_t = (1 - t) z + t e with logit-normal times t, predicts the clean z from x_t without being
told t, and is sampled with Euler steps. Printed: the judge's Fréchet distance (judge.py) against
the number of calls of the network.
"""
import copy
import dataclasses
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
import torch.nn.functional as F

from ablate import train_denoiser
from judge import Scores                                     # it adds the folder of the next
import sphere_latent as sl

STEPS = (1, 2, 4, 6, 8, 16, 50)


def fit_flow(config, autoencoder, images):
    """Train the denoiser's transformer as a flow. Returns the model with averaged weights."""
    torch.manual_seed(config.seed)
    device, classes = torch.device("cpu"), len(images.classes)
    model = sl.denoiser_for(config, autoencoder.latent_shape, classes)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    batches = sl.random_batches(images, config.batch_size, range(config.train_steps), config,
                                "update", device)            # the same images as ours
    for step, (x, labels) in enumerate(batches):
        rate = sl.learning_rate_at(step, config.train_steps, config.learning_rate)
        optimizer.param_groups[0]["lr"] = rate
        generator = sl.generator_for("noise", config.seed, step)
        z = autoencoder.encode(x).repeat(2, 1, 1)            # as many views as ours
        y = labels.repeat(2)
        dropped = torch.rand(len(y), generator=generator) < sl.LABEL_DROPOUT
        t = torch.randn(len(y), 1, 1, generator=generator).sigmoid()
        e = torch.randn(z.shape, generator=generator)
        with sl.autocast(device, config.precision):
            z_hat = model((1 - t) * z + t * e, y.masked_fill(dropped, classes))
        loss = F.mse_loss(z_hat.float(), z)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sl.update_average(average, model, config.ema_decay)
    return average


@torch.no_grad()
def sample_flow(model, labels, steps, cfg_scale, noise):
    """Euler steps from t = 1 to t = 0 -> latents [B, N, C]."""
    x = noise
    for k in range(steps):
        t, next_t = 1 - k / steps, 1 - (k + 1) / steps
        z_hat = sl.guided(model, x, labels, model.num_classes, cfg_scale)
        x = z_hat + (x - z_hat) * next_t / t
    return x


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run on the drawn flowers")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cfg-scales", type=float, nargs="+", default=[1.5, 2.5])
    given = parser.parse_args()
    start, autoencoder, _ = sl.load_run(given.run)
    images, held_out = sl.load_images(start, "train"), sl.load_images(start, "test")
    scores = Scores(images, held_out)
    y = sl.balanced_labels(600, len(images.classes))

    def judged(z):
        images = torch.cat([autoencoder.decode(some) for some in z.split(100)])
        return scores(images, y)["judge"]

    for seed in given.seeds:
        config = dataclasses.replace(start, train_steps=given.updates, seed=seed)
        _, _, ours = train_denoiser(config, autoencoder, images)
        flow = fit_flow(config, autoencoder, images)
        for scale in given.cfg_scales:
            generator = torch.Generator().manual_seed(1234)
            noise = torch.randn(max(STEPS), len(y), *ours.latent_shape, generator=generator)
            for steps in STEPS:
                z_ours = sl.sample(ours, y, steps, scale, noise=noise[:steps])
                z_flow = sample_flow(flow, y, steps, scale, noise[0])
                print(f"seed {seed}  guidance {scale:g}  {steps} calls: ours {judged(z_ours):.4f}  "
                      f"flow {judged(z_flow):.4f}", flush=True)


if __name__ == "__main__":
    main()
