"""Kill a small run at random moments, resume it, and compare its end with an unbroken run, bit by bit.

    python tests/experiments/kill.py --count 24 --seed 0

SIGKILL cannot be caught: nothing of the run can clean up after itself. Each run gets one, at a moment
drawn at random between its start and its end, and is then resumed. A run that was killed before it
had a folder is started again. Printed for each: how far it was, and whether weights and pictures are
those of the unbroken run.
"""
import argparse
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import torch

FILE = pathlib.Path(__file__).resolve().parents[2] / "sphere_latent.py"
FLAGS = ("--image-size 16 --patch-size 8 --latent-channels 8 --autoencoder-steps 40 --train-steps 60 "
         "--batch-size 8 --eval-samples 24 --save-every 7 --device cpu").split()
PICTURES = ("samples.png", "reconstructions.png")


def start(*words):
    command = [sys.executable, str(FILE), "train", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def state_of(folder):
    """How far a run is, from its files."""
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        return f"update {torch.load(checkpoint, weights_only=True)['step']}"
    if (folder / "autoencoder.pt").exists():
        return "autoencoder"
    return "config" if (folder / "config.json").exists() else "nothing"


def weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return [tensor for part in ("model", "average", "autoencoder") for tensor in state[part].values()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    root = pathlib.Path(tempfile.mkdtemp())
    unbroken = root / "unbroken"
    began = time.time()
    if start(*FLAGS, "--out", unbroken).wait() != 0:
        sys.exit("the unbroken run failed")
    length = time.time() - began
    print(f"unbroken run: {length:.1f} s")
    wrong = 0
    for number in range(given.count):
        folder = root / f"run{number}"
        process = start(*FLAGS, "--out", folder)
        moment = chance.uniform(0, length)
        time.sleep(moment)
        process.kill()
        process.wait()
        found = state_of(folder)
        if found == "nothing":
            code = start(*FLAGS, "--out", folder).wait()
        else:
            code = start("--resume", folder).wait()
        same = code == 0 and all(map(torch.equal, weights(folder), weights(unbroken)))
        same_pictures = code == 0 and all((folder / name).read_bytes() == (unbroken / name).read_bytes()
                                          for name in PICTURES)
        wrong += not (same and same_pictures)
        print(f"{number:3} killed after {moment:5.1f} s, at {found:12} exit code {code}, weights "
              f"{'equal' if same else 'DIFFER'}, pictures {'equal' if same_pictures else 'DIFFER'}",
              flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(root)
    print(f"{given.count - wrong} of {given.count} ended as the unbroken run")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
