"""Kill a small run at random moments, resume it, compare its end with an unbroken run, bit by bit.

    python tests/experiments/kill.py --count 24 --seed 0

SIGKILL cannot be caught: nothing of the run can clean up after itself. A run that was killed before
it had a folder is started again. Printed for each: how far it was, and whether weights and pictures
are those of the unbroken run.
"""
import argparse
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import torch

FILE = pathlib.Path(__file__).resolve().parents[2] / "sphere_latent.py"
FLAGS = ("--image-size 16 --patch-size 8 --latent-channels 8 --autoencoder-steps 40 "
         "--train-steps 60 --batch-size 8 --eval-samples 24 --save-every 7 --device cpu").split()


def start(*words):
    command = [sys.executable, str(FILE), "train", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def is_equal(folder, other):
    a, b = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (folder, other)]
    for part in ("model", "average", "autoencoder"):
        if not all(map(torch.equal, a[part].values(), b[part].values())):
            return False
    return all((folder / name).read_bytes() == (other / name).read_bytes()
               for name in ("samples.png", "reconstructions.png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as root:
        unbroken = pathlib.Path(root) / "unbroken"
        began = time.time()
        if start(*FLAGS, "--out", unbroken).wait() != 0:
            sys.exit("the unbroken run failed")
        length = time.time() - began
        equal = 0
        for number in range(given.count):
            folder = pathlib.Path(root) / f"run{number}"
            process = start(*FLAGS, "--out", folder)
            time.sleep(chance.uniform(0, length))
            process.kill()
            process.wait()
            files = sorted(path.name for path in folder.glob("*"))
            words = ["--resume", folder] if "config.json" in files else [*FLAGS, "--out", folder]
            code = start(*words).wait()
            same = code == 0 and is_equal(folder, unbroken)
            equal += same
            print(f"{number:3} {'equal' if same else 'DIFFERENT'}, exit code {code}, killed with "
                  f"{', '.join(files) or 'nothing'}", flush=True)
    print(f"{equal} of {given.count} ended as the unbroken run")
    sys.exit(equal < given.count)


if __name__ == "__main__":
    main()
