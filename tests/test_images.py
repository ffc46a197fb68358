"""Images in files, as people have them: what is found, what is held out, what is read."""
import os
import pickle

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from conftest import fill
from PIL import Image

import sphere_latent as sl

CPU = torch.device("cpu")


def settings(folder, dataset="folder", image_size=16, autoencoder="tiny"):
    return sl.Config(dataset=dataset, data_dir=str(folder), image_size=image_size, patch_size=8,
                     autoencoder=autoencoder)


def both_splits(folder):
    return sl.find_images(settings(folder)).values()


def names_by_class(images):
    found = {name: [] for name in images.classes}
    for path, label in zip(images.paths, images.labels.tolist(), strict=True):
        found[images.classes[label]].append(os.path.basename(path))
    return found


@pytest.mark.parametrize("names, expected", [
    (["z/1.png", "é/2.png", "z/deep/3.png", "a/4.png", "a/10.png"],
     {"a": ["10.png", "4.png"], "z": ["1.png", "3.png"], "é": ["2.png"]}),
    (["1.png", "2.png", "3.png", "notes/4.txt", "5.png"],    # no class: that of the folder
     {"root": ["1.png", "2.png", "3.png", "5.png"]}),
    (["a/1.PNG", "a/2.Jpg", "a/3.jfif", "a/4.webp", "a/5.h5", "a/6.mpg", "7.pdf"],
     {"a": ["1.PNG", "2.Jpg", "3.jfif", "4.webp"]}),
    (["a/1.png", "a/2.png", "a/3.png", "a/4.png", "a/.5.png", "a/._6.png", ".b/7.png",
      "a/.c/8.png", "__MACOSX/a/9.png"], {"a": ["1.png", "2.png", "3.png", "4.png"]}),
    (["1.png", "2.png", "3.png", "4.png", "checkpoint.pt", "samples.png", "runs/x/checkpoint.pt",
      "runs/x/samples.png"], {"root": ["1.png", "2.png", "3.png", "4.png"]})])
def test_what_is_found_in_a_folder(tmp_path, names, expected):
    train, _ = both_splits(fill(tmp_path / ".hidden/root", *names))
    assert names_by_class(train) == expected and train.classes == sorted(expected)


def test_links_are_followed_and_what_is_left_out_is_named(tmp_path, capsys):
    fill(tmp_path, "root/a/1.png", "root/raw/1.heic", "root/9.png", "there/2.png", "there/3.png")
    (tmp_path / "root/b").symlink_to("../there")
    (tmp_path / "root/a/4.png").symlink_to("../../there/3.png")
    train, _ = both_splits(tmp_path / "root")
    assert names_by_class(train) == {"a": ["1.png", "4.png"], "b": ["2.png", "3.png"]}
    out = capsys.readouterr().out
    assert "folder raw holds no image" in out and "1 images in" in out


def test_of_each_class_every_tenth_image_is_held_out(tmp_path):
    counts = {"a": 19, "b": 9}
    fill(tmp_path, *[f"{name}/{i:02}.png" for name in counts for i in range(counts[name])])
    train, test = both_splits(tmp_path)                      # one image is too few to compare with
    assert train is test and len(train) == 28
    train, test = map(names_by_class, both_splits(fill(tmp_path, "a/19.png")))
    assert test == {"a": ["09.png", "19.png"], "b": []}
    for name, count in (("a", 20), ("b", 9)):                # none is lost or doubled
        assert sorted(train[name] + test[name]) == [f"{i:02}.png" for i in range(count)]


def test_folders_train_and_val_are_the_split(tmp_path):
    folder = fill(tmp_path, *[f"train/{name}/{i}.png" for name in "abc" for i in range(30)])
    train, _ = both_splits(folder / "train")                 # alone it is a folder of classes
    assert train.classes == ["a", "b", "c"] and len(train) == 90 - 9
    with pytest.raises(sl.UserError, match="no folders train and val"):
        sl.find_images(settings(folder, "imagenet"))
    fill(folder, "test/b/0.png")
    with pytest.raises(sl.UserError, match="fewer than 2 images in .*test"):
        both_splits(folder)
    fill(folder, "test/c/1.png", "test/c/2.png")
    train, test = both_splits(folder)
    assert train.classes == test.classes and train.classes == ["a", "b", "c"]
    assert train.labels.bincount().tolist() == [30, 30, 30] and test.labels.tolist() == [1, 2, 2]
    fill(folder, *[f"val/{i}.JPEG" for i in range(5)])       # flat, as ImageNet's; before test
    test = sl.find_images(settings(folder, "imagenet"))["test"]
    assert list(map(os.path.basename, test.paths)) == [f"{i}.JPEG" for i in range(5)]


QUARTERS = np.array([[0, 80], [160, 240]], np.uint8).repeat(8, 0).repeat(8, 1)
CHECKERBOARD = (np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)
TURNED = Image.Exif()
TURNED[0x0112] = 6                                           # as a phone held upright writes it
WIDE = Image.new("RGB", (400, 18), "red")
WIDE.paste((0, 60, 0), (191, 0, 209, 18))                    # the square in the middle


@pytest.mark.parametrize("image, ending, options, expected", [
    (Image.new("CMYK", (9, 9), (0, 255, 0, 0)), "tiff", {}, (255, 0, 255)),
    (Image.new("RGBA", (9, 9), (0, 100, 200, 128)), "png", {}, (127, 177, 227)),
    (Image.new("P", (9, 9)), "png", {"transparency": 0}, (255, 255, 255)),
    (Image.new("RGB", (1, 1), (200, 0, 9)), "png", {}, (200, 0, 9)),
    (WIDE, "png", {}, (0, 60, 0)),
    (WIDE.transpose(Image.Transpose.ROTATE_90), "png", {}, (0, 60, 0)),
    (Image.fromarray(CHECKERBOARD), "png", {}, 127.5),       # antialiased
    (Image.fromarray(np.rot90(QUARTERS).copy()), "jpg", {"exif": TURNED}, QUARTERS[..., None])])
def test_an_image_becomes_an_upright_square_over_white(tmp_path, image, ending, options, expected):
    image.save(tmp_path / f"a.{ending}", **options)
    pixels = sl.read_image(tmp_path / f"a.{ending}", 16)
    assert np.abs(pixels.permute(1, 2, 0).numpy() - np.array(expected)).mean() < 3


def cut(path):
    Image.effect_noise((99, 99), 50).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("spoil, why", [
    (cut, "truncated"), (lambda path: path.write_text("dear diary"), "cannot identify"),
    (lambda path: Image.new("I;16", (9, 9)).save(path, "PNG"), "convert it to 8 bits")])
def test_a_file_that_cannot_be_used_is_named_and_skipped(tmp_path, capsys, spoil, why):
    fill(tmp_path, *[f"{name}/{i}.png" for name in "ab" for i in range(3)])
    for name in ("a/broken.jpg", "a/0.jpg", "b/3.jpg"):      # three of nine
        spoil(tmp_path / name)
    images = sl.load_images(settings(tmp_path), "train")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(images.pixels) == 6
    errors = capsys.readouterr().err
    assert errors.count(f"skipped: {tmp_path / 'a/broken.jpg'}") == 1
    assert errors.count("skipped:") == 3 and errors.count(why) == 3


def test_half_of_the_images_broken_or_a_whole_class_is_refused(tmp_path):
    def read():
        return sl.load_images(settings(tmp_path), "train")
    fill(tmp_path, *[f"a/{i}.png" for i in range(9)])
    fill(tmp_path, "b/good.png", *[f"b/{i}.jpg" for i in range(8)])          # empty files
    assert len(read()) == 10
    (tmp_path / "b/good.png").unlink()
    with pytest.raises(sl.UserError, match="no image of class b can be read"):
        read()
    fill(tmp_path, "b/8.jpg")
    with pytest.raises(sl.UserError, match=f"9 of 18 images cannot be read: {tmp_path}/b/0.jpg"):
        read()


def test_a_batch_is_the_images_one_by_one_in_memory_and_from_files(tmp_path, monkeypatch):
    fill(tmp_path, *[f"{name}/{i}.png" for name in "ab" for i in range(4)])
    for i in range(4):
        Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / f"b/{i}.png")
    config = settings(tmp_path)
    in_memory = sl.load_images(config, "train")
    monkeypatch.setattr(sl, "IN_MEMORY", 0)
    from_files = sl.load_images(config, "train")
    assert in_memory.pixels is not None and from_files.pixels is None
    for images in (in_memory, from_files):
        [loaded] = sl.make_loader(images, [[6, 0, 6]], CPU)
        for pixels, labels in (images.__getitems__([6, 0, 6]), loaded):
            assert pixels.dtype == torch.uint8 and pixels.shape == (3, 3, 16, 16)
            assert pixels.amax((1, 2, 3)).tolist() == [2, 0, 2] and labels.tolist() == [1, 0, 1]
        x, label = images[6]
        assert torch.equal(255 * x, pixels[0].float()) and label == 1 and type(label) is int
    assert sl.make_loader(from_files, [[0]], CPU).num_workers > 0


def make_cifar10(folder, monkeypatch):
    """CIFAR-10 as published, but two images a batch. Returns all pixels."""
    data, files = torchvision.datasets.CIFAR10, folder / "cifar-10-batches-py"
    files.mkdir()
    monkeypatch.setattr(data, "_check_integrity", lambda self: True)
    monkeypatch.setattr(data, "meta", {**data.meta, "md5": None})
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    pixels[0] = np.tile([0, 255, 255, 0], 3072 // 4)         # columns
    contents = {"batches.meta": {"label_names": list("abcdefghij")}}
    for i, name in enumerate([*[f"data_batch_{n}" for n in range(1, 6)], "test_batch"]):
        contents[name] = {"data": pixels[2 * i:2 * i + 2], "labels": [i, 9 - i]}
    for name, content in contents.items():
        (files / name).write_bytes(pickle.dumps(content))
    return torch.from_numpy(pixels).view(12, 3, 32, 32)


def test_cifar10_from_its_files(tmp_path, monkeypatch):
    pixels = make_cifar10(tmp_path, monkeypatch)
    train, test = sl.load_both_splits(settings(tmp_path, "cifar10", image_size=32))
    assert torch.equal(train.pixels, pixels[:10]) and torch.equal(test.pixels, pixels[10:])
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert test.labels.tolist() == [5, 4]
    assert train.classes == list("abcdefghij")
    smaller = sl.load_images(settings(tmp_path, "cifar10", image_size=8), "train").pixels
    assert smaller.shape == (10, 3, 8, 8) and smaller.dtype == torch.uint8
    assert (smaller[0].float() - 127.5).abs().mean() < 3     # antialiased


def make_flowers(folder, monkeypatch, count=40):
    """Oxford-Flowers as published, but a few images of 2 classes; each says class and number."""
    data, folder = torchvision.datasets.Flowers102, folder / "flowers-102"
    monkeypatch.setattr(data, "_check_integrity", lambda self: True)
    monkeypatch.setattr(data, "classes", ["pink primrose", "orchid"])
    fill(folder, "jpg/readme")
    for i in range(count):
        colour = 200 * (2 * i // count), 6 * i, 0
        Image.new("RGB", (16, 16), colour).save(folder / f"jpg/image_{i + 1:05}.jpg")
    labels = [[1 + 2 * i // count for i in range(count)]]
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels})
    numbers = np.random.default_rng(0).permutation(count)[None] + 1
    parts = {"trnid": numbers[:, :6], "valid": numbers[:, 6:9], "tstid": numbers[:, 9:]}
    scipy.io.savemat(folder / "setid.mat", parts)


@pytest.mark.parametrize("autoencoder", ["dinov2-b", "tiny"])
def test_oxford_flowers_from_its_files(tmp_path, monkeypatch, autoencoder):
    make_flowers(tmp_path, monkeypatch)
    read, original = [], sl.read_image
    monkeypatch.setattr(sl, "read_image", lambda *file: read.append(file) or original(*file))
    train, test = sl.load_both_splits(settings(tmp_path, "flowers", autoencoder=autoencoder))
    assert len(read) == 40 and len(set(read)) == 40          # each is read once
    assert train.classes == ["pink primrose", "orchid"]
    if autoencoder == "dinov2-b":                            # both are all photographs
        assert train is test and train.labels.bincount().tolist() == [20, 20]
    else:                                                    # every tenth is held out
        assert train.labels.bincount().tolist() == [18, 18]
        greens = (test.pixels[:, 1].float().mean((1, 2)) / 6).round().tolist()
        assert test.labels.tolist() == [0, 0, 1, 1] and greens == [9, 19, 29, 39]
    reds = train.pixels[:, 0].float().mean((1, 2))
    assert torch.equal(train.labels, (reds > 100).long())
