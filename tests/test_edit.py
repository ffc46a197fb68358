"""The command edit: between two, another class, two crossed; for both methods."""
import numpy as np
import pytest
import torch
from PIL import Image

import sphere_latent as sl


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two held-out drawings as files."""
    folder, images = tmp_path_factory.mktemp("photos"), sl.drawn_images("test", 16)
    for name, i in (("a.png", 0), ("b.jpg", 5)):
        Image.fromarray(images.pixels[i].permute(1, 2, 0).numpy()).save(folder / name)
    return folder / "a.png", folder / "b.jpg"


def edit(*words):
    return sl.main(["edit", *map(str, words)])


def watched(monkeypatch):
    """-> what the pictures are made of: [(rows, names of the rows, names of the columns)]."""
    import extras
    seen, original = [], extras.picture
    monkeypatch.setattr(extras, "picture", lambda path, *parts: seen.append(parts) or original(path, *parts))
    return seen


@pytest.mark.parametrize("method", ["latent", "encoder"])
def test_each_way_leaves_a_picture_of_input_way_and_output(method, run, predecessor, photos, tmp_path, monkeypatch):
    seen, checkpoint = watched(monkeypatch), run if method == "latent" else predecessor
    for words, count in ((["--between", 3, 4, "--to", "daisy"], 9), (["--between", *photos], 9),
                         (["--image", photos[0], "--to", 3, "--tilt", 50], 1), (["--crossover", *photos], 3)):
        out = tmp_path / "out.png"
        assert edit("--checkpoint", checkpoint, *words, "--out", out) == 0
        rows, *_ = seen.pop()
        assert len(rows) == 3 and all(row.shape == (count, 3, 16, 16) and row.isfinite().all() for row in rows)
        assert all(0 <= row.min() and row.max() <= 1 for row in rows) and out.stat().st_size > 1000
        out.unlink()
        animation = out.with_suffix(".gif")
        assert animation.exists() == (words[0] == "--between")
        if animation.exists():
            assert Image.open(animation).n_frames > 1 or method == "encoder"       # hardly trained: frames that are equal
            animation.unlink()


def test_the_ends_of_the_way_are_the_two_images_and_no_tilt_changes_little(run, photos, tmp_path, monkeypatch):
    """The first row is what the autoencoder makes of points on the arc; tilted by nothing, the second is the first."""
    seen, (_, autoencoder, _) = watched(monkeypatch), sl.load_run(run)
    assert edit("--checkpoint", run, "--between", *photos, "--tilt", 0, "--out", tmp_path / "a.png") == 0
    start, tilted, _ = seen[0][0]
    torch.testing.assert_close(start, tilted, atol=1e-4, rtol=0)
    for end, path in ((0, photos[0]), (-1, photos[1])):
        x = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
        z = sl.spherify(autoencoder.encode(x))
        torch.testing.assert_close(start[end], autoencoder.decode(z)[0].clamp(0, 1), atol=1e-4, rtol=0)


def test_a_seed_gives_the_image_that_sample_would_give(run, tmp_path, monkeypatch):
    """One random point, the same noise after it: edit and sample end in the same image."""
    seen, (config, autoencoder, denoiser) = watched(monkeypatch), sl.load_run(run)
    assert edit("--checkpoint", run, "--image", 7, "--to", 2, "--seed", 7, "--no-fresh-noise", "--out", tmp_path / "a.png") == 0
    changed = sl.dataclasses.replace(config, seed=7, fresh_noise=False)
    same = sl.sample_images(denoiser, autoencoder, torch.tensor([2]), changed)
    # sample starts from e, edit from f(e): the sphere makes them one, up to rounding
    torch.testing.assert_close(seen[0][0][2], same, atol=2e-3, rtol=0)


@pytest.mark.parametrize("words, expected", [
    ([], "one of"), (["--between", "1", "2", "--image", "3"], "one of"), (["--image", "nowhere.png"], "nowhere.png"),
    (["--image", "1", "--to", "weed"], "weed"), (["--image", "1", "--out", "a.gif"], ".png")])
def test_wrong_words_are_one_line(run, words, expected, capsys):
    assert edit("--checkpoint", run, *words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and expected in error[0]
