"""Kill a small training run at random moments, resume it, and compare its end with an unbroken run, bit for bit.

    python tests/kill.py --count 24 [--seed 0]

Half of the moments are anywhere in the run, half inside a stage taken in turn (a checkpoint write lasts milliseconds
and would hardly ever be hit by chance). A run killed before its first checkpoint has to say that it must be started
again, and the same command has to work. SIGKILL cannot be caught: nothing of the run can clean up after itself.
"""
import argparse
import contextlib
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

import matplotlib.figure  # noqa: F401  what a run imports late is imported here, once for all
import numpy as np
import torch
import torch._dynamo  # noqa: F401
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import sphere_latent as sl  # noqa: E402

SAVE_EVERY = 7
UPDATES = 30
FLAGS = (f"--dataset folder --image-size 16 --patch-size 8 --latent-channels 8 --autoencoder-width 32 "
         f"--autoencoder-depth 1 --autoencoder-steps {UPDATES} --train-steps {UPDATES} --batch-size 16 "
         f"--eval-samples 48 --save-every {SAVE_EVERY} --device cpu").split()
STAGES = {"load_images": "reading images", "fit_autoencoder": "autoencoder", "latent_reader": "encoding",
          "fit_denoiser": "denoiser", "save_checkpoint": "checkpoint write", "evaluate_run": "evaluation",
          "sample_figure": "pictures", "reconstruction_figure": "pictures", "loss_figure": "pictures"}


def watch(path):
    """Make this process's run tell `path` its stage, the stages entered, the part it fits, and the updates done."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    state = {"stage": "elsewhere", "entered": 0, "part": "", "done": 0}

    def write(**changes):
        state.update(changes)
        os.pwrite(file, f"{state['stage']:<20}{state['part']:<12}{state['entered']:>8}{state['done']:>8}".encode(), 0)

    def wrap(name, stage):
        original = getattr(sl, name)

        def inside(*arguments, **named):
            before, fits = state["stage"], {"part": stage, "done": 0} if name.startswith("fit_") else {}
            write(stage=stage, entered=state["entered"] + 1, **fits)
            try:
                return original(*arguments, **named)
            finally:
                write(stage=before, entered=state["entered"] + 1)
        setattr(sl, name, inside)
    for name, stage in STAGES.items():
        wrap(name, stage)
    rate = sl.learning_rate_at

    def counted(step, *arguments):                                   # called at the start of each update
        write(done=step)
        return rate(step, *arguments)
    sl.learning_rate_at = counted
    write()


def start(words, status, log):
    """Fork a run -> process id. Nothing of torch has run in this process but on one thread."""
    process = os.fork()
    if process:
        return process
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    code = 99
    with contextlib.suppress(BaseException):
        watch(status)
        code = sl.main([str(word) for word in words])
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def read_status(path):
    """-> stage, stages entered, part that is fitted, updates done in it."""
    text = path.read_bytes().decode() if path.exists() else ""
    if len(text) < 48:
        return "elsewhere", 0, "", 0
    return text[:20].strip(), int(text[32:40]), text[20:32].strip(), int(text[40:])


def wait(process, status, timeline):
    """Follow a run to its end -> exit code; timeline gets (seconds, stage, entered)."""
    began, last = time.time(), None
    while True:
        ended, code = os.waitpid(process, os.WNOHANG)
        now = read_status(status)[:2]
        if now != last:
            timeline.append((time.time() - began, *now))
            last = now
        if ended:
            timeline.append((time.time() - began, "end", -1))
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.0003)


def weights(path):
    state = torch.load(path, weights_only=True)
    return [value for part in ("model", "ema", "autoencoder") for value in state[part].values()]


def equal(a, b):
    """-> the weights are the same bits; the other files (but the log, which holds seconds) are the same and no more."""
    pairs = zip(weights(a / "checkpoint.pt"), weights(b / "checkpoint.pt"), strict=True)
    same = all(torch.equal(x, y) for x, y in pairs)
    kept = [{path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".part") or
             path.name == "frechet.csv"} for folder in (a, b)]
    return same, kept[0] == kept[1]


def saved_step(folder):
    """-> stage and updates of the newest checkpoint of a killed run; torch.load fails if it is damaged."""
    for name, stage in (("checkpoint.pt", "denoiser"), ("autoencoder.pt", "autoencoder")):
        if (folder / name).exists():
            return stage, torch.load(folder / name, weights_only=True)["step"]
    return None, 0


def kill_at(process, status, moment):
    """SIGKILL at `moment`: the number of a stage, and seconds after it was entered -> False: the run was over."""
    (entered, after), ended = moment, 0
    while not ended and read_status(status)[1] < entered:
        time.sleep(0.0003)
        ended = os.waitpid(process, os.WNOHANG)[0]
    until = time.time() + after
    while not ended and time.time() < until:
        time.sleep(min(0.001, max(0.0, until - time.time())))
        ended = os.waitpid(process, os.WNOHANG)[0]
    if not ended:
        os.kill(process, signal.SIGKILL)
        ended = not os.WIFSIGNALED(os.waitpid(process, 0)[1])
    return not ended


def one_kill(number, folder, words, moment, unbroken):
    """Kill one run, resume it, print a row -> stage, updates lost, equal weights, all well; None: it was over."""
    status, log = folder.with_suffix(".status"), folder.with_suffix(".log")
    if not kill_at(start([*words, "--out", folder], status, log), status, moment):
        shutil.rmtree(folder)
        return None
    stage, _, part, done = read_status(status)
    held, saved = saved_step(folder)
    lost = max(0, done - saved if held == part else done)            # 0: the last update was saved already
    code, how = wait(start(["train", "--resume", folder, "--device", "cpu"], status, log), status, []), "resumed"
    if held is None:
        how = "started anew" if code == 2 and "start again" in log.read_text(errors="replace") else f"WRONG {code}"
        code = wait(start([*words, "--out", folder], status, log), status, [])
    same, files = equal(folder, unbroken) if code == 0 else (False, False)
    good = same and files and lost <= SAVE_EVERY and not how.startswith("WRONG")
    state = f"{held} {saved}" if held else "none"
    verdict = "equal" if same else "DIFFER" if code == 0 else f"exit {code}"
    print(f"{number:>3}  {stage:<17} {done:>6}  {state:<15} {lost:>5}  {how:<13} {verdict:<8} "
          f"{'equal' if files else 'DIFFER'}", flush=True)
    if good:
        shutil.rmtree(folder)
    return stage, lost, same, good


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=24, help="moments to kill at")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sl.MODEL_SIZES["tiny"] = 64, 2, 2
    chance, root = random.Random(arguments.seed), pathlib.Path(tempfile.mkdtemp(prefix="kill"))
    pixels = np.random.default_rng(0)
    for i in range(200):
        path = root / "photos" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
    words, timeline = ["train", *FLAGS, "--data-dir", root / "photos"], []
    code = wait(start([*words, "--out", root / "unbroken"], root / "status", root / "log"), root / "status", timeline)
    if code:
        sys.exit(f"the unbroken run ended with {code}:\n{(root / 'log').read_text()}")
    length = timeline[-1][0]
    print(f"unbroken run: {length:.1f} s, a checkpoint every {SAVE_EVERY} updates of {UPDATES} + {UPDATES}\n"
          f"  #  killed in         update  newest state    lost  went on       weights  files")
    spans = {stage: [] for stage in dict.fromkeys(STAGES.values())}
    for (begin, stage, entered), (end, *_) in zip(timeline, timeline[1:]):
        if stage in spans:
            spans[stage].append((entered, end - begin))
    rows, order = [], [stage for stage in spans if spans[stage]]
    while len(rows) < arguments.count:
        number, anywhere = len(rows) + 1, chance.uniform(timeline[0][0], length)
        begin, _, entered = [row for row in timeline if row[0] <= anywhere][-1]
        moment = entered, anywhere - begin                             # by progress: another run may be slower
        if number % 2:
            entered, lasts = chance.choice(spans[order[number // 2 % len(order)]])
            moment = entered, chance.uniform(0, lasts)
        row = one_kill(number, root / f"run{number}", words, moment, root / "unbroken")
        rows += [row] if row else []
    bad = [number for number, row in enumerate(rows, 1) if not row[-1]]
    print(f"{len(rows)} moments: " + ", ".join(f"{sum(row[0] == stage for row in rows)} {stage}"
                                               for stage in dict.fromkeys(row[0] for row in rows)))
    print(f"at most {max(row[1] for row in rows)} updates lost; "
          f"{sum(row[2] for row in rows)} of {len(rows)} ended with equal weights, "
          f"{len(rows) - len(bad)} with equal pictures too"
          + (f"; look at {', '.join(f'run{number}' for number in bad)} in {root}" if bad else ""))
    if not bad:
        shutil.rmtree(root)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
