"""Sphere Encoder, the predecessor, in the same file: the same losses, the same loop, through pixels."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import sphere_latent as sl
from conftest import SMALL


def random_model(classes=3):
    """A small SphereEncoder whose labels and transformers matter, as after training."""
    torch.manual_seed(0)
    config = sl.Config(method="sphere-encoder", image_size=16, patch_size=8, latent_channels=8)
    model = sl.denoiser_for(config, None, classes)
    for weight in model.parameters():
        if weight.requires_grad and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval().requires_grad_(False)


def test_the_preset_is_what_the_paper_says_as_far_as_it_is_known():
    config = sl.preset("drawn", "sphere-encoder")
    assert (config.noise_distribution, config.max_angle, config.latent_consistency_weight) == ("uniform-tangent", 85, 0.1)
    assert (config.tilt, config.tilt_schedule, config.fresh_noise) == (85, "fixed", False)
    assert 25 <= config.reconstruction_weight <= 50 and 1 <= config.consistency_weight <= 25
    assert sl.preset("cifar10", "sphere-encoder").image_size == 32


def test_a_run_has_the_usual_files_and_one_model_for_both_halves(predecessor):
    config, autoencoder, model = sl.load_run(predecessor)
    assert autoencoder is model and isinstance(model, sl.SphereEncoder) and config.method == "sphere-encoder"
    names = {path.name for path in predecessor.iterdir()}
    assert {"checkpoint.pt", "config.json", "log.csv", "loss.png", "samples.png", "reconstructions.png"} <= names
    assert not {"autoencoder.pt", "autoencoder.csv"} & names


def test_it_can_be_sampled_evaluated_rebuilt_and_resumed(predecessor, tmp_path, capsys):
    for words in (["sample", "--steps", "3", "--classes", "poppy", "0", "--out", str(tmp_path / "a.png")],
                  ["evaluate", "--eval-samples", "24", "--out", str(tmp_path / "a.csv")],
                  ["reconstruct", "--out", str(tmp_path / "b.png")]):
        assert sl.main([*words, "--checkpoint", str(predecessor)]) == 0
    assert "Fréchet distance" in capsys.readouterr().out
    assert sl.main(["train", "--resume", str(predecessor)]) == 0


def test_resumed_equals_unbroken(predecessor, tmp_path, monkeypatch):
    out, rate = tmp_path / "run", sl.learning_rate_at

    def stop(step, steps, config):
        if step == 4:
            raise KeyboardInterrupt
        return rate(step, steps, config)
    monkeypatch.setattr(sl, "learning_rate_at", stop)
    words = [*SMALL, "--method", "sphere-encoder", "--out", str(out), "--save-every", "3"]
    assert sl.main(["train", *words]) == 130
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(sl, "learning_rate_at", rate)
    assert sl.main(["train", "--resume", str(out)]) == 0
    states = [torch.load(run / "checkpoint.pt", weights_only=True)["ema"] for run in (predecessor, out)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_both_halves_know_the_label_and_both_are_trained(predecessor):
    model, x, v = random_model(), torch.rand(2, 3, 16, 16), sl.spherify(torch.randn(2, 4, 8))
    a, b = torch.tensor([0, 0]), torch.tensor([1, 2])
    assert (model.encode_raw(x, a) - model.encode_raw(x, b)).abs().max() > 1e-3
    assert (model(v, a) - model(v, b)).abs().max() > 1e-3
    start = sl.denoiser_for(sl.load_run(predecessor)[0], None, 12)
    trained = torch.load(predecessor / "checkpoint.pt", weights_only=True)["model"]
    for half in ("encoder.head.weight", "decoder.head.weight"):              # zero before the first update
        assert not start.state_dict()[half].any() and trained[half].any()


def test_the_losses_are_those_of_the_paper_by_hand():
    """decode = D, encode = f o E, target = the image: the same sphere_losses."""
    config, model = sl.preset("drawn", "sphere-encoder"), random_model()
    x, y, e = torch.rand(2, 3, 16, 16), torch.tensor([0, 2]), torch.randn(2, 4, 8)
    small, large = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 1.4])
    v = model.encode_raw(x, y)
    got = sl.sphere_losses(model, lambda images: model.encode_raw(images, y), v, x, y, e, small, large, config)
    near, far = (model(sl.spherify(v + alpha.tan()[:, None, None] * e), y) for alpha in (small, large))
    cosine = F.cosine_similarity(model.encode_raw(far, y).flatten(1), v.flatten(1)).mean()
    want = F.smooth_l1_loss(near, x), F.smooth_l1_loss(far, near), 1 - cosine
    torch.testing.assert_close(torch.stack([got[name] for name in list(got)[:3]]), torch.stack(want), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got["total"], 25 * want[0] + config.consistency_weight * want[1] + 0.1 * want[2],
                               rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale, share", [(1.0, 0.5), (2.25, 0.5), (2.25, 1.0), (2.25, 0.0)])
def test_a_step_decodes_encodes_tilts_and_decodes_each_half_guided_by_its_share(scale, share):
    model, y, null = random_model(), torch.tensor([0, 2]), torch.tensor([3, 3])
    e = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))

    def guided(half, x, scale):
        return half(x, null) + scale * (half(x, y) - half(x, null))
    for_encoder, for_decoder = {0.5: (math.sqrt(scale), math.sqrt(scale)), 1.0: (scale, 1), 0.0: (1, scale)}[share]
    x = guided(model, sl.spherify(e), for_decoder)
    for _ in range(2):
        x = sl.spherify(guided(model.encode_raw, x, for_encoder))            # guidance leaves the sphere
        x = guided(model, sl.noisy_spherify(x, e, math.radians(85)), for_decoder)
    got, other = (sl.sample(model, y, 3, scale, angle=math.radians(85), schedule="fixed", noise=e, share=s)
                  for s in (share, 0.25))
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3)
    assert scale == 1 or (other - x).abs().max() > 0.01


def test_the_flag_says_which_half_is_guided(predecessor, monkeypatch, tmp_path):
    seen, sample = [], sl.sample
    monkeypatch.setattr(sl, "sample", lambda *a, **k: seen.append(k["share"]) or sample(*a, **k))
    for position in ("encoder", "decoder", "both"):
        assert sl.main(["sample", "--checkpoint", str(predecessor), "--cfg-position", position, "--count", "1",
                        "--out", str(tmp_path / "a.png")]) == 0
    assert seen == [1.0, 0.0, 0.5]


def test_samples_do_not_depend_on_the_batch(predecessor):
    config, autoencoder, model = sl.load_run(predecessor)
    whole, parts = (sl.sample_images(model, autoencoder, torch.arange(10), config, batch) for batch in (10, 3))
    assert whole.shape == (10, 3, 16, 16) and 0 <= whole.min() and whole.max() <= 1
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-2)


def test_the_target_can_be_put_on_the_sphere(run, tmp_path, monkeypatch):
    seen, losses = [], sl.sphere_losses
    monkeypatch.setattr(sl, "sphere_losses", lambda d, e, v, target, *rest: seen.append(target) or losses(d, e, v, target, *rest))
    for flag in ("--no-sphere-target", "--sphere-target"):
        assert sl.main(["train", *SMALL, "--train-steps", "1", flag, "--out", str(tmp_path / flag)]) == 0
    torch.testing.assert_close(sl.spherify(seen[0]), seen[1])
    assert not torch.allclose(seen[0], seen[1])


def test_side_by_side_refuses_what_it_cannot_compare(run, tmp_path, capsys):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["config"]["dataset"] = "folder"
    torch.save(state, tmp_path / "checkpoint.pt")
    for words, expected in (([tmp_path / "absent"], "absent"), ([tmp_path], "same images"), ([run, "--out", "a.gif"], ".png")):
        assert sl.main(["evaluate", "--checkpoint", str(run), *map(str, words)]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and expected in error[0]


def test_side_by_side(run, predecessor, tmp_path, capsys):
    """The table of evaluate for two runs: parameters and FLOPs as counted here, times, distances; and the figure."""
    words = ["--eval-samples", "24", "--out", tmp_path / "both.png"]
    assert sl.main(["evaluate", "--checkpoint", *map(str, [run, predecessor, *words])]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("/")][:-1]
    table = {(row[0], int(row[1])): [float(x.replace(",", "")) for x in row[2:]] for row in rows}
    assert len(table) == 8 and all(ms > 0 and distance >= 0 for *_, ms, distance in table.values())
    for path in (run, predecessor):
        config, autoencoder, model = sl.load_run(path)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(2, *autoencoder.latent_shape), torch.tensor([0, 12]))
        step = counter.get_total_flops() / 1e9
        (scale, parameters, one, *_), four = table[str(path), 1], table[str(path), 4][2]
        assert scale == config.cfg_scale and parameters == sum(p.numel() for m in {autoencoder, model} for p in m.parameters())
        if config.method == "sphere-latent":                                 # decoding, once, is not in `step`
            assert four - one == pytest.approx(3 * step, abs=0.002) and one > step - 0.001
        else:
            assert one == pytest.approx(step, abs=0.001) and four > 4 * step + 2 * step  # encoding comes three times
    assert Image.open(tmp_path / "both.png").size[0] > 1000


def test_a_changed_method_is_refused_in_one_line(predecessor, tmp_path, capsys):
    state = torch.load(predecessor / "checkpoint.pt", weights_only=True)
    state["config"]["method"] = "sphere-latent"
    torch.save(state, tmp_path / "checkpoint.pt")
    assert sl.main(["sample", "--checkpoint", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert dataclasses.replace(sl.Config(), method="sphere-encoder").method == "sphere-encoder"
    for word in ("sphere", "folder", "drawn"):
        assert sl.main(["train", "--method", word]) == 2 and "--method" in capsys.readouterr().err
