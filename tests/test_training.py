"""Training: what a step gets and does; a run that is stopped goes on as if nothing had happened."""
import copy
import os
import pathlib
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sphere_latent as sl
from conftest import ROOT, SMALL, fewer_drawings, points
from sphere_latent import read_checkpoint as saved

CPU = torch.device("cpu")
SETTINGS = ["--train-steps", "12", "--save-every", "4", "--micro-batch", "3", "--ema-decay", "0.8",
            "--reconstruction-weight", "2", "--consistency-weight", "0.5",
            "--latent-consistency-weight", "3"]


@pytest.fixture(autouse=True, scope="module")
def no_pictures(small_run):
    """Here only weights matter. Pictures and distances would take longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sample_figure", "reconstruction_figure", "loss_figure"):
            patch.setattr(sl, name, lambda *arguments: None)
        patch.setattr(sl, "evaluate", lambda *arguments: [{"frechet_distance": 0.0}])
        yield


def train(folder, *flags):
    return sl.main(["train", *SMALL, *flags, "--out", str(folder)])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])     # a copy


@pytest.fixture(scope="module")
def watched(no_pictures, tmp_path_factory):
    """A run of twelve updates with SETTINGS, and what went through it."""
    seen = SimpleNamespace(folder=tmp_path_factory.mktemp("watched"), weights=[], rates=[],
                           batches=[], losses=[], drawn_with=[], decoder=[])
    step, losses, fit = sl.training_step, sl.sphere_losses, sl.fit_tiny_rae

    def training_step(denoiser, average, optimizer, batch, *rest):
        seen.weights = seen.weights or [weights(denoiser)]
        seen.batches.append(batch)
        result = step(denoiser, average, optimizer, batch, *rest)
        seen.weights.append(weights(denoiser))
        seen.rates.append(optimizer.param_groups[0]["lr"])
        return result

    def sphere_losses(*arguments):
        seen.losses.append(arguments)
        return losses(*arguments)

    def fit_tiny_rae(autoencoder, some_images, batches, config):
        seen.decoder = list(batches)
        return fit(autoencoder, some_images, seen.decoder, config)

    with pytest.MonkeyPatch.context() as patch:
        for function in (training_step, sphere_losses, fit_tiny_rae):
            patch.setattr(sl, function.__name__, function)
        patch.setattr(sl, "sample_figure", lambda run, *_: seen.drawn_with.append(weights(run[2])))
        assert train(seen.folder, *SETTINGS) == 0
    return seen


def test_pictures_and_checkpoint_have_the_moving_average_of_all_updates(watched):
    average, averages = watched.weights[0], []
    for current in watched.weights[1:]:
        average = 0.8 * average + 0.2 * current
        averages.append(average)
    for drawn, step in zip(watched.drawn_with, (4, 8, 12), strict=True):
        torch.testing.assert_close(drawn, averages[step - 1], rtol=0, atol=1e-6)
    *_, denoiser = sl.load_run(watched.folder)
    torch.testing.assert_close(weights(denoiser), averages[-1], rtol=0, atol=1e-6)
    assert (averages[-1] - watched.weights[-1]).abs().max() > 1e-4


def test_each_update_has_its_learning_rate(watched):
    assert watched.rates == pytest.approx([(n + 1) / 50 * 5e-3 for n in range(12)], rel=1e-6)
    rates = [sl.learning_rate_at(step, 1000, 3.0) for step in (0, 24, 49, 500, 750, 999)]
    assert rates == pytest.approx([3 / 50, 1.5, 3, 3, 1.5, 0.006])


def test_the_denoiser_learns_the_latents_of_training_images_with_their_labels(watched):
    _, autoencoder, _ = sl.load_run(watched.folder)
    images = fewer_drawings("train", 16)
    x = images.pixels / 255
    latents = autoencoder.encode(torch.cat([x, x.flip(-1)])).flatten(1)
    labels = torch.cat([images.labels, images.labels])
    assert len(watched.batches) == 12
    for batch in watched.batches:
        assert [len(z) for z, _ in batch] == [3, 3, 2]
        for z, y in batch:
            distance, nearest = torch.cdist(z.flatten(1), latents).min(1)    # those held out: > 3
            assert distance.max() < 1e-3 and torch.equal(labels[nearest], y)


def test_the_decoder_learns_training_images_in_as_many_batches_as_asked(watched):
    pixels = fewer_drawings("train", 16).pixels
    known = {image.numpy().tobytes() for image in torch.cat([pixels, pixels.flip(-1)])}
    assert [len(x) for x in watched.decoder] == [8] * 6
    assert {(255 * image).round().byte().numpy().tobytes()
            for x in watched.decoder for image in x} <= known


def test_the_losses_get_the_batch_and_new_noise_in_every_update(watched):
    batches = [part for batch in watched.batches for part in batch]
    for (z, labels), inputs in zip(batches, watched.losses, strict=True):
        denoiser, same_z, seen, e, alpha_small, alpha_large, config = inputs
        assert same_z is z and ((seen == labels) | (seen == 12)).all() and e.shape == z.shape
        assert (alpha_small < alpha_large).all() and len(alpha_large) == len(z)
    e = torch.cat([inputs[3] for inputs in watched.losses]).flatten(1)
    assert e.std().item() == pytest.approx(1, abs=0.05)
    assert (torch.cdist(e, e) + 9 * torch.eye(96)).min() > 1
    assert len(torch.cat([inputs[5] for inputs in watched.losses]).unique()) == 96


def test_the_log_has_the_means_of_the_losses_and_their_weighted_sum(watched):
    rows = saved(watched.folder)["log"]
    assert [row["step"] for row in rows] == [4, 8, 10, 12]
    for row in rows:
        expected = (2 * row["reconstruction"] + 0.5 * row["consistency"]
                    + 3 * row["latent_consistency"])
        assert row["total"] == pytest.approx(expected, rel=1e-5)
    losses = [[{name: torch.tensor(float(n + k)) for k, name in enumerate("ab")}] for n in (1, 4)]
    assert sl.mean_losses([losses[0][0], losses[1][0]]) == {"a": 2.5, "b": 3.5}


def new_denoiser(seed=0):
    """A small denoiser, none of whose weights is zero, and its average."""
    torch.manual_seed(seed)
    denoiser = sl.Denoiser((4, 8), 3, 32, 1, 2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return denoiser, copy.deepcopy(denoiser)


def test_a_tenth_of_the_labels_become_the_null_label(generator):
    denoiser, average = new_denoiser()
    optimizer, given, seen = torch.optim.SGD(denoiser.parameters(), 0.0), [], []

    def loss_of(network, z, labels, *rest):
        seen.append(labels)
        return {"total": network.head.weight.sum()}

    for step in range(100):
        labels = torch.randint(3, (64,), generator=generator)
        given += labels.split(40)
        batch = [(torch.zeros(len(some), 4, 8), some) for some in labels.split(40)]
        sl.training_step(denoiser, average, optimizer, batch, sl.Config(), generator, loss_of)
    given, seen = torch.cat(given), torch.cat(seen)
    is_dropped = seen == 3
    assert is_dropped.float().mean().item() == pytest.approx(0.1, abs=0.015)     # 4 deviations
    assert torch.equal(given[~is_dropped], seen[~is_dropped])
    for label in range(3):
        assert is_dropped[given == label].float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_gradients_are_new_in_each_update_and_clipped_to_the_norm_1(generator):
    denoiser, average = new_denoiser()
    count = sum(p.numel() for p in denoiser.parameters() if p.requires_grad) ** 0.5
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.5)
    batch = [(torch.zeros(5, 4, 8), torch.zeros(5, dtype=torch.long))] * 2
    for norm in (1000, 0.25):
        before = weights(denoiser)
        result = sl.training_step(denoiser, average, optimizer, batch, sl.Config(), generator,
                                  lambda network, *_: {"total": norm / count * sum(
                                      p.sum() for p in network.parameters() if p.requires_grad)})
        assert result["gradient_norm"].item() == pytest.approx(norm, rel=1e-4)       # before
        moved = (weights(denoiser) - before).norm().item()
        assert moved == pytest.approx(0.5 * min(norm, 1), rel=1e-3)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_give_the_gradient_and_losses_of_the_whole_batch(monkeypatch, size):
    """The noise is fixed: each latent carries its number as its label."""
    monkeypatch.setattr(sl, "LABEL_DROPOUT", 0.0)
    z, e, angles = points(0, 7, 4, 8), points(1, 7, 4, 8), torch.linspace(0.1, 0.7, 7)
    config = sl.Config(precision="float32")

    def loss_of(network, z, number, *unused):
        return sl.sphere_losses(network, z, number % 3, e[number], angles[number],
                                2 * angles[number], config)

    results = []
    for parts in (7, size):
        denoiser, average = new_denoiser()
        batch = list(zip(z.split(parts), torch.arange(7).split(parts)))
        losses = sl.training_step(denoiser, average, torch.optim.SGD(denoiser.parameters(), 0.1),
                                  batch, config, torch.Generator().manual_seed(parts), loss_of)
        results.append([losses, weights(denoiser)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flags, expected", [
    ([], (True, torch.bfloat16)), (["--precision", "float32"], (False, torch.float32))])
def test_only_the_denoiser_runs_in_bfloat16(tmp_path, monkeypatch, bfloat16, flags, expected):
    seen = {}

    def watch(owner, name):
        original = getattr(owner, name)

        def watching(*arguments):
            result = original(*arguments)
            seen.setdefault((owner, name), set()).add(
                (torch.is_autocast_enabled("cpu"), result.dtype))
            return result
        monkeypatch.setattr(owner, name, watching)

    for owner, name in ((sl.TinyRAE, "encode"), (sl.TinyRAE, "decode"), (sl.Denoiser, "forward")):
        watch(owner, name)
    assert train(tmp_path, "--train-steps", "2", *flags) == 0
    sl.sample_images(sl.load_run(tmp_path), torch.arange(3), 2)
    assert seen == {(sl.TinyRAE, "encode"): {(False, torch.float32)},
                    (sl.TinyRAE, "decode"): {(False, torch.float32)},
                    (sl.Denoiser, "forward"): {expected}}


def test_batches_are_drawn_and_half_of_them_mirrored():
    images = fewer_drawings("train", 16)

    def draw(flips, steps=range(4), purpose="update", seed=0):
        config = sl.Config(flips=flips, seed=seed)
        return list(sl.random_batches(images, 300, steps, config, purpose, CPU))

    plain, flipped = draw(False), draw(True)
    numbers = {image.numpy().tobytes(): n for n, image in enumerate(images.pixels)}
    chosen = [[numbers[(255 * image).round().byte().numpy().tobytes()] for image in x]
              for x, _ in plain]
    assert len(set(sum(chosen, []))) > 230                   # of 240
    assert len({tuple(some) for some in chosen}) == 4
    for (x, labels), some in zip(plain, chosen):
        assert torch.equal(labels, images.labels[some])
    x, y = torch.cat([x for x, _ in plain]), torch.cat([y for y, _ in flipped])
    is_mirrored = (x != y).flatten(1).any(1)
    assert torch.equal(y[is_mirrored], x[is_mirrored].flip(-1))
    assert is_mirrored.float().mean().item() == pytest.approx(0.5, abs=0.06)     # 4 deviations
    torch.testing.assert_close(draw(True, range(2, 4)), flipped[2:], rtol=0, atol=0)
    for others in (draw(True, purpose="decoder"), draw(True, seed=1)):
        assert not torch.equal(others[0][0], flipped[0][0])


def test_part_one_alone_learns_made_up_latents():
    lines = (ROOT / "sphere_latent.py").read_text().splitlines()
    end = next(n for n, line in enumerate(lines) if line.startswith("# ==== Part II"))
    part = {}
    exec("\n".join(lines[:end]), part)
    config, generator = part["Config"](), torch.Generator().manual_seed(0)
    means = points(1, 3, 4, 8)
    torch.manual_seed(0)
    denoiser = part["Denoiser"]((4, 8), 3, 64, 2, 2)
    average = copy.deepcopy(denoiser)
    optimizer = torch.optim.AdamW(denoiser.parameters(), 2e-3)
    history = []
    for step in range(300):
        labels = torch.randint(3, (32,), generator=generator)
        z = means[labels] + 0.2 * torch.randn(32, 4, 8, generator=generator)
        losses = part["training_step"](denoiser, average, optimizer, [(z, labels)], config,
                                       generator)
        history.append(losses["total"].item())
    assert sum(history[-20:]) < 0.3 * sum(history[:20])
    labels = torch.arange(60) % 3
    z = part["sample"](average, labels, steps=4, generator=generator)
    distances = torch.cdist(z.flatten(1), means.flatten(1))
    assert (distances.argmin(1) == labels).float().mean() > 0.95
    assert distances.min(1).values.mean() < 0.5 * torch.pdist(means.flatten(1)).min()


# ---- runs that are stopped -----------------------------------------------------------------------

def stop_in_update(number, action, monkeypatch):
    """Let action(losses) replace the losses of update `number`, counted from 1, and later ones."""
    step, calls = sl.training_step, []

    def training_step(*arguments):
        calls.append(arguments)
        losses = step(*arguments)
        return action(losses) if len(calls) >= number else losses
    monkeypatch.setattr(sl, "training_step", training_step)


def ctrl_c(losses):
    os.kill(os.getpid(), signal.SIGINT)
    return losses


@pytest.mark.parametrize("number, update", [(1, 0), (7, 4), (12, 8)])
def test_a_resumed_run_equals_the_unbroken_one(watched, tmp_path, monkeypatch, capsys, number,
                                               update):
    with monkeypatch.context() as patch:
        stop_in_update(number, ctrl_c, patch)
        assert train(tmp_path, *SETTINGS) == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"update {update} is saved" in message and f"train --resume {tmp_path}" in message
    assert saved(tmp_path)["step"] == update
    assert sl.main(["train", "--resume", str(tmp_path)]) == 0
    a, b = saved(watched.folder), saved(tmp_path)
    for part in ("model", "average", "autoencoder"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)         # bit for bit
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    tables = [(run / "log.csv").read_text().splitlines() for run in (watched.folder, tmp_path)]
    assert len(tables[0]) == 5 and tables[0][0].endswith(",seconds")
    assert [[row.rpartition(",")[0] for row in table] for table in tables[:1]] == [
        [row.rpartition(",")[0] for row in table] for table in tables[1:]]


def test_a_finished_run_can_be_trained_longer_with_other_micro_batches(watched, tmp_path,
                                                                       monkeypatch):
    folder = shutil.copytree(watched.folder, tmp_path / "run")
    monkeypatch.setattr(sl, "fit_tiny_rae", lambda *arguments: pytest.fail("trained once more"))
    sizes, step = [], sl.training_step
    monkeypatch.setattr(sl, "training_step", lambda *arguments: (
        sizes.append([len(z) for z, _ in arguments[3]]), step(*arguments))[1])
    words = ["train", "--resume", str(folder), "--train-steps", "14", "--micro-batch", "5"]
    assert sl.main(words) == 0 and sizes == [[5, 3]] * 2
    assert [row["step"] for row in saved(folder)["log"]] == [4, 8, 10, 12, 14]
    before, after = saved(watched.folder), saved(folder)
    torch.testing.assert_close(after["autoencoder"], before["autoencoder"], rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    stop_in_update(6, lambda losses: {name: x * torch.nan for name, x in losses.items()},
                   monkeypatch)
    assert train(tmp_path, *SETTINGS) == 2
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    assert saved(tmp_path)["step"] == 4                      # the last good one


def test_a_checkpoint_is_whole_at_every_moment(tmp_path, monkeypatch):
    def fail_halfway(state, target):
        pathlib.Path(target).write_bytes(b"half")
        raise RuntimeError("file write failed")              # what torch says of a full disk
    path = tmp_path / "checkpoint.pt"
    sl.save_checkpoint(path, {"step": 3})
    with open(path, "rb") as reader:                         # has the old file open, reads it late
        sl.save_checkpoint(path, {"step": 6})
        assert torch.load(reader)["step"] == 3
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(torch, "save", fail_halfway)
    with pytest.raises(sl.UserError, match="kept"):
        sl.save_checkpoint(path, {"step": 9})
    assert torch.load(path)["step"] == 6


def test_images_that_stay_in_their_files_give_the_same_weights(tmp_path, monkeypatch):
    images = fewer_drawings("train", 16)
    for number in range(40):
        folder = tmp_path / "images" / images.classes[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = images.pixels[number].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    results = []
    for name, limit in (("memory", sl.IN_MEMORY), ("files", 0)):
        monkeypatch.setattr(sl, "IN_MEMORY", limit)
        assert train(tmp_path / name, "--train-steps", "3", "--dataset", "folder", "--data-dir",
                     str(tmp_path / "images")) == 0
        results.append([saved(tmp_path / name)[part] for part in ("model", "autoencoder")])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_the_plain_one(tmp_path, float32):
    for name, flag in (("plain", "--no-compile"), ("compiled", "--compile")):
        assert train(tmp_path / name, "--train-steps", "3", "--save-every", "1", flag) == 0
    plain, compiled = saved(tmp_path / "plain"), saved(tmp_path / "compiled")
    for row, other in zip(plain["log"], compiled["log"], strict=True):
        assert other["total"] == pytest.approx(row["total"], rel=1e-3)
        assert other["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=1e-3)
    assert list(plain["model"]) == list(compiled["model"])   # a checkpoint does not show it
