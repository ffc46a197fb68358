"""Training: what a step gets and does; a run that is stopped goes on as if nothing had happened."""
import copy
import pathlib
import shutil
from types import SimpleNamespace

import pytest
import torch

import sphere_latent as sl
from conftest import ROOT, SMALL, fewer_drawings, points
from sphere_latent import read_checkpoint as saved

SETTINGS = ["--train-steps", "12", "--save-every", "4", "--micro-batch", "3", "--ema-decay", "0.8",
            "--reconstruction-weight", "2", "--consistency-weight", "0.5",
            "--latent-consistency-weight", "3"]


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
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


def as_bytes(images):
    return [(255 * image).round().byte().numpy().tobytes() for image in images]


@pytest.fixture(scope="module")
def watched(no_pictures, small_sizes, tmp_path_factory):
    """A run of twelve updates with SETTINGS, and what went through it."""
    seen = SimpleNamespace(folder=tmp_path_factory.mktemp("watched"), weights=[], rates=[],
                           batches=[], inputs=[], results=[], drawn_with=[])
    step, losses, fit = sl.training_step, sl.sphere_losses, sl.fit_tiny_rae

    def training_step(denoiser, average, optimizer, batch, *rest):
        seen.weights = seen.weights or [weights(denoiser)]
        seen.batches.append(batch)
        seen.results.append(step(denoiser, average, optimizer, batch, *rest))
        seen.weights.append(weights(denoiser))
        seen.rates.append(optimizer.param_groups[0]["lr"])
        return seen.results[-1]

    def sphere_losses(*arguments):
        seen.inputs.append(arguments)
        return losses(*arguments)

    def fit_tiny_rae(autoencoder, some_images, batches, config):
        seen.some_images, seen.decoder_batches = some_images, list(batches)
        return fit(autoencoder, some_images, seen.decoder_batches, config)

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
    _, autoencoder, denoiser = sl.load_run(watched.folder)
    torch.testing.assert_close(weights(denoiser), averages[-1], rtol=0, atol=1e-6)
    assert (averages[-1] - watched.weights[-1]).abs().max() > 1e-4
    for model in (denoiser, autoencoder):
        assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_each_update_has_its_learning_rate(watched):
    expected = [5e-3 * n / 50 for n in range(1, 12)] + [5e-3 / 6]            # it warms up, decays
    assert watched.rates == pytest.approx(expected)
    rates = [sl.learning_rate_at(step, 1000, 3.0) for step in (0, 24, 49, 200, 500, 750, 999)]
    assert rates == pytest.approx([3 / 50, 1.5, 3, 3, 3, 1.5, 0.006])


def test_only_training_images_are_learned_with_their_labels(watched):
    images = fewer_drawings("train", 16)
    x = torch.cat([images.pixels, images.pixels.flip(-1)]) / 255
    assert set(as_bytes(torch.cat([*watched.decoder_batches, watched.some_images]))) <= set(
        as_bytes(x))
    assert [len(batch) for batch in watched.decoder_batches] == [8] * 6
    _, autoencoder, _ = sl.load_run(watched.folder)
    latents = autoencoder.encode(x).flatten(1)
    assert len(watched.batches) == 12
    for batch in watched.batches:
        assert [len(z) for z, _ in batch] == [3, 3, 2]
        for z, labels in batch:
            distances = (z.flatten(1)[:, None] - latents).norm(dim=2)
            nearest, number = distances.min(1)               # 0; that of held-out images is over 1
            assert nearest.max() < 1e-3 and torch.equal(images.labels[number % 240], labels)


def new_denoiser():
    """A small denoiser, none of whose weights is zero, and its average."""
    torch.manual_seed(0)
    denoiser = sl.Denoiser((4, 8), 3, 32, 1, 2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return denoiser, copy.deepcopy(denoiser)


def test_a_tenth_of_the_labels_is_dropped_and_each_gradient_is_new_and_clipped(generator):
    denoiser, average = new_denoiser()
    learned = [p for p in denoiser.parameters() if p.requires_grad]
    count, given, seen = sum(p.numel() for p in learned), [], []
    optimizer = torch.optim.SGD(learned, lr=0.5)
    for norm in [1000, 0.25] * 50:                           # of the gradient
        def loss_of(network, z, labels, *rest):
            seen.append(labels)
            return {"total": norm / count ** 0.5 * sum(p.sum() for p in learned)}

        before = weights(denoiser)
        given.append(torch.randint(3, (64,), generator=generator))
        batch = [(torch.zeros(len(some), 4, 8), some) for some in given[-1].split(40)]
        log = sl.training_step(denoiser, average, optimizer, batch, sl.Config(), generator, loss_of)
        moved = (weights(denoiser) - before).norm().item()
        assert moved == pytest.approx(0.5 * min(norm, 1), rel=1e-3)
        assert log["gradient_norm"].item() == pytest.approx(norm, rel=1e-3)          # unclipped
    given, seen = torch.cat(given), torch.cat(seen)
    is_dropped = seen == 3                                   # the null label
    assert torch.equal(given[~is_dropped], seen[~is_dropped])
    for label in range(3):
        assert is_dropped[given == label].float().mean().item() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_give_the_gradient_and_losses_of_the_whole_batch(monkeypatch, size):
    """The noise is fixed: each latent has its number for a label."""
    monkeypatch.setattr(sl, "LABEL_DROPOUT", 0.0)
    z, e, angles = points(0, 7, 4, 8), points(1, 7, 4, 8), torch.linspace(0.1, 0.7, 7)
    config = sl.Config(precision="float32")

    def loss_of(network, z, number, *unused):
        return sl.sphere_losses(network, z, number % 3, e[number], angles[number],
                                2 * angles[number], config)

    results = []
    for some in (7, size):
        denoiser, average = new_denoiser()
        batch = list(zip(z.split(some), torch.arange(7).split(some)))
        losses = sl.training_step(denoiser, average, torch.optim.SGD(denoiser.parameters(), 0.1),
                                  batch, config, torch.Generator(), loss_of)
        results.append([losses, [p.grad for p in denoiser.parameters() if p.requires_grad]])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flags, expected", [
    ([], (True, torch.bfloat16)), (["--precision", "float32"], (False, torch.float32))])
def test_only_the_denoiser_runs_in_bfloat16(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(sl, "has_fast_bfloat16", lambda device: True)
    seen = {}

    def watch(owner, name):
        original = getattr(owner, name)

        def watching(*arguments):
            result = original(*arguments)
            found = (torch.is_autocast_enabled("cpu"), result.dtype)
            seen.setdefault(name, set()).add(found)
            return result
        monkeypatch.setattr(owner, name, watching)

    for owner, name in ((sl.TinyRAE, "encode"), (sl.TinyRAE, "decode"), (sl.Denoiser, "forward")):
        watch(owner, name)
    assert train(tmp_path, "--train-steps", "2", *flags) == 0
    sl.sample_images(sl.load_run(tmp_path), torch.arange(3), 2)
    exact = {(False, torch.float32)}
    assert seen == {"encode": exact, "decode": exact, "forward": {expected}}


def test_batches_are_drawn_anew_and_half_of_them_mirrored():
    images = fewer_drawings("train", 16)

    def draw(flips, steps=range(4), purpose="update", seed=0):
        config = sl.Config(flips=flips, seed=seed)
        device = torch.device("cpu")
        return [x for x, _ in sl.random_batches(images, 300, steps, config, purpose, device)]

    plain, flipped = draw(False), draw(True)
    assert len(set(as_bytes(torch.cat(plain)))) > 230        # of 240
    x, y = torch.cat(plain), torch.cat(flipped)
    is_mirrored = (x != y).flatten(1).any(1)
    assert torch.equal(y[is_mirrored], x[is_mirrored].flip(-1))
    assert is_mirrored.float().mean().item() == pytest.approx(0.5, abs=0.06)     # 4 deviations
    torch.testing.assert_close(draw(True, range(2, 4)), flipped[2:], rtol=0, atol=0)
    for other in (plain[1], draw(False, purpose="decoder")[0], draw(False, seed=1)[0]):
        assert not torch.equal(other, plain[0])


def test_part_one_alone_learns_made_up_latents(generator):
    part_one = {}
    exec((ROOT / "sphere_latent.py").read_text().split("\n# ==== Part II")[0], part_one)
    means, config = points(1, 3, 4, 8), part_one["Config"](precision="float32")
    torch.manual_seed(0)
    denoiser = part_one["Denoiser"]((4, 8), 3, 32, 2, 2)
    average = copy.deepcopy(denoiser)
    optimizer = torch.optim.AdamW(denoiser.parameters(), 4e-3)
    history = []
    for _ in range(60):
        labels = torch.randint(3, (32,), generator=generator)
        z = means[labels] + 0.2 * torch.randn(32, 4, 8, generator=generator)
        losses = part_one["training_step"](denoiser, average, optimizer, [(z, labels)], config,
                                           generator)
        history.append(losses["total"].item())
    expected = [0.98964, 0.66505, 0.45974, 0.25247]          # see test_numbers.py
    assert [history[n] for n in (0, 9, 29, 59)] == pytest.approx(expected, rel=1e-3)
    labels = torch.arange(60) % 3
    z = part_one["sample"](denoiser, labels, generator=generator)
    distances = torch.cdist(z.flatten(1), means.flatten(1))
    assert (distances.argmin(1) == labels).float().mean() > 0.95
    assert distances.min(1).values.mean() < 0.5 * torch.pdist(means.flatten(1)).min()
    assert z.abs().mean().item() == pytest.approx(0.70328, rel=1e-3)


# ---- runs that are stopped -----------------------------------------------------------------------

def in_update(number, action, monkeypatch):
    """Let action(losses) replace the losses of update `number`, counted from 1, and later ones."""
    step, calls = sl.training_step, []

    def training_step(*arguments):
        calls.append(arguments)
        losses = step(*arguments)
        return action(losses) if len(calls) >= number else losses
    monkeypatch.setattr(sl, "training_step", training_step)


def ctrl_c(losses):
    raise KeyboardInterrupt


@pytest.mark.parametrize("number, update", [(1, 0), (7, 4)])
def test_a_resumed_run_equals_the_unbroken_one(watched, tmp_path, monkeypatch, capsys, number,
                                               update):
    with monkeypatch.context() as patch:
        in_update(number, ctrl_c, patch)
        assert train(tmp_path, *SETTINGS) == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"update {update} is saved" in message and f"train --resume {tmp_path}" in message
    assert saved(tmp_path)["step"] == update
    assert sl.main(["train", "--resume", str(tmp_path)]) == 0
    a, b = saved(watched.folder), saved(tmp_path)
    parts = [[run["model"], run["average"], run["autoencoder"], run["optimizer"]["state"]]
             for run in (a, b)]
    torch.testing.assert_close(*parts, rtol=0, atol=0)       # bit for bit
    tables = [[line.rpartition(",") for line in (run / "log.csv").read_text().splitlines()]
              for run in (watched.folder, tmp_path)]         # the last column: seconds
    assert [line[0] for line in tables[0]] == [line[0] for line in tables[1]]


def test_a_finished_run_can_be_trained_longer_with_other_micro_batches(watched, tmp_path,
                                                                       monkeypatch):
    folder, sizes, step = shutil.copytree(watched.folder, tmp_path / "run"), [], sl.training_step
    monkeypatch.setattr(sl, "fit_tiny_rae", lambda *arguments: pytest.fail("trained once more"))
    monkeypatch.setattr(sl, "training_step", lambda *arguments: (
        sizes.append([len(z) for z, _ in arguments[3]]), step(*arguments))[1])
    words = ["train", "--resume", str(folder), "--train-steps", "14", "--micro-batch", "5"]
    assert sl.main(words) == 0 and sizes == [[5, 3]] * 2
    assert [row["step"] for row in saved(folder)["log"]] == [4, 8, 10, 12, 14]
    before, after = saved(watched.folder), saved(folder)
    torch.testing.assert_close(after["autoencoder"], before["autoencoder"], rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    in_update(6, lambda losses: {name: x * torch.nan for name, x in losses.items()}, monkeypatch)
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


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_the_plain_one(tmp_path):
    logs = []
    for flag in ("--no-compile", "--compile"):
        flags = ["--train-steps", "3", "--save-every", "1", "--precision", "float32", flag]
        assert train(tmp_path / flag, *flags) == 0
        logs.append([row["total"] for row in saved(tmp_path / flag)["log"]])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    sl.load_run(tmp_path / "--compile")                      # its weights have their plain names
