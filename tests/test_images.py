"""Drawn flowers, and folders of images as people have them."""
import os

import numpy as np
import pytest
import torch
from PIL import Image

import sphere_latent as sl


def test_drawn_flowers_are_deterministic_and_split(whole):
    draw = sl.drawn_images
    a, b = draw("test", 16), draw("test", 16)
    assert torch.equal(a.pixels, b.pixels) and len(a.classes) == 12 and len(a) == 1200
    assert not torch.equal(a.pixels, draw("test", 16, seed=1).pixels)
    train = {image.numpy().tobytes() for image in draw("train", 16).pixels}
    assert len(train) == 6000 and not any(image.numpy().tobytes() in train for image in a.pixels)
    image, label = a[5]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and 0 <= image.min() <= image.max() <= 1
    assert label == 5 and isinstance(label, int)


def folder_config(path, size=16):
    return sl.Config(dataset="folder", data_dir=str(path), image_size=size, patch_size=8)


def both_splits(path):
    config = folder_config(path)
    return [sl.load_images(config, split) for split in ("train", "test")]


def save(path, mode="RGB", size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, options.pop("color", 0)).save(path, **options)


def test_class_folders_are_split_without_overlap(tmp_path):
    for name in ("tulip", "été"):
        for i in range(40):
            save(tmp_path / name / "deep er" / f"{i}.png", color=(i, 99, 0))
    config = folder_config(tmp_path)
    train, test = sl.load_images(config, "train"), sl.load_images(config, "test")
    assert train.classes == test.classes == sorted(["tulip", "été"])
    assert len(train) + len(test) == 80 and 1 <= len(test) < 20
    assert set(train.labels.tolist()) == {0, 1}


def test_images_alone_are_one_class(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.jpg")
    assert sl.load_images(folder_config(tmp_path), "train").classes == [tmp_path.name]


@pytest.mark.parametrize("mode, color, ending, expected", [
    ("RGB", (200, 0, 0), "png", (200, 0, 0)), ("L", 77, "png", (77, 77, 77)), ("P", 0, "png", (0, 0, 0)),
    ("RGBA", (9, 9, 9, 0), "png", (255, 255, 255)), ("LA", (9, 0), "png", (255, 255, 255)),
    ("1", 1, "png", (255, 255, 255)), ("CMYK", (0, 0, 0, 0), "jpg", (255, 255, 255))])
def test_every_mode_becomes_rgb(tmp_path, mode, color, ending, expected):
    save(tmp_path / f"a.{ending}", mode, color=color)
    image = sl.open_image(tmp_path / f"a.{ending}", 8)
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
    assert (image.float().mean((1, 2)) - torch.tensor(expected).float()).abs().max() <= 2


@pytest.mark.parametrize("mode, ending", [("I;16", "png"), ("F", "tiff"), ("I", "tiff")])
def test_more_than_8_bits_a_channel_is_refused_with_the_reason(tmp_path, mode, ending):
    """Their range is not known, so any conversion would be a guess."""
    save(tmp_path / f"a.{ending}", mode, color=100)
    with pytest.raises(ValueError, match="8 bits"):
        sl.open_image(tmp_path / f"a.{ending}", 8)


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:10] = 255                                             # bright above
    exif = Image.Exif()
    exif[0x0112] = 3                                              # stored upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = sl.open_image(tmp_path / "a.png", 8).float()
    assert image[:, :3].mean() < 5 and image[:, -3:].mean() > 250


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (17, 400)])
def test_any_shape_fits(tmp_path, size):
    save(tmp_path / "a.png", size=size, color=(50, 60, 70))
    assert sl.open_image(tmp_path / "a.png", 8).float().mean((1, 2)).tolist() == [50, 60, 70]


def test_unreadable_files_are_named_and_few_are_skipped(tmp_path, capsys):
    for i in range(200):
        save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "broken.jpg").write_text("no picture")
    assert sum(map(len, both_splits(tmp_path))) == 200
    assert capsys.readouterr().err.count("skipped") == 1
    for i in range(9):
        (tmp_path / "a" / f"empty{i}.png").touch()
    with pytest.raises(sl.UserError, match=r"of 1\d\d images can be read"):
        sl.load_images(folder_config(tmp_path), "train")


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(sl.UserError, match="0 image files"):
        sl.load_images(folder_config(tmp_path), "train")
    with pytest.raises(sl.UserError, match="no such folder"):
        sl.load_images(folder_config(tmp_path / "absent"), "train")


def test_cifar10_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    import torchvision

    def refuse(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    with pytest.raises(sl.UserError, match="cifar-10-python.tar.gz.*no network"):
        sl.load_images(sl.dataclasses.replace(sl.preset("cifar10"), data_dir=str(tmp_path)), "train")


@pytest.mark.parametrize("size", [32, 64])
def test_cifar10_at_its_own_size_and_larger(tmp_path, monkeypatch, size):
    import torchvision

    class FakeCIFAR10:
        classes = ["cat", "dog"]

        def __init__(self, root, train, download):
            self.data, self.targets = np.full((6 if train else 4, 32, 32, 3), 200, np.uint8), [0, 1] * (3 if train else 2)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    config = sl.dataclasses.replace(sl.preset("cifar10"), image_size=size)
    train, test = sl.load_images(config, "train"), sl.load_images(config, "test")
    assert len(train) == 6 and len(test) == 4 and train.classes == ["cat", "dog"]
    image, label = test[1]
    assert image.shape == (3, size, size) and label == 1 and image.mean() == pytest.approx(200 / 255)


def test_a_handful_of_images_still_has_both_splits(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png")
    config = folder_config(tmp_path)
    assert len(sl.load_images(config, "train")) == len(sl.load_images(config, "test")) == 2
    (tmp_path / "3.png").unlink()
    with pytest.raises(sl.UserError, match="3 image files; at least 4"):
        sl.load_images(folder_config(tmp_path), "train")


def test_a_decompression_bomb_is_skipped(tmp_path, monkeypatch, capsys):
    for i in range(150):
        save(tmp_path / f"{i}.png", size=(9, 9))
    save(tmp_path / "bomb.png", size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert sum(map(len, both_splits(tmp_path))) == 150
    error = capsys.readouterr().err
    assert "bomb.png" in error and "decompression bomb" in error


def test_loose_images_beside_class_folders_are_a_class_of_their_own(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/4.png", "5.png", "6.png"):
        save(tmp_path / name)
    train, test = both_splits(tmp_path)
    assert train.classes == test.classes == sorted(["a", "b", tmp_path.name]) and len(train) + len(test) == 6


def test_what_is_no_image_file_is_passed_over(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    save(tmp_path / ".hidden" / "5.png")
    save(tmp_path / "._0.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "paper.pdf").write_text("%PDF")
    assert [str(name) for name in sl.image_files(tmp_path)] == [f"{i}.png" for i in range(4)]


def test_names_of_any_bytes_are_split(tmp_path):
    for name in (b"caf\xe9.png", b"1.png", b"2.png", b"3.png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            Image.new("RGB", (9, 9)).save(file, "PNG")
    assert len(sl.load_images(folder_config(tmp_path), "test")) == 2
