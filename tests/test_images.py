"""Images in folders, as people have them: what is found, what is held out, what is read."""
import os
import types

import numpy as np
import pytest
import torchvision
from conftest import SMALL
from PIL import Image

import sphere_latent as sl


def fill(folder, *names):
    """Make files: small images, empty files, and links where the name is "from -> to"."""
    for name in names:
        name, _, target = name.partition(" -> ")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif path.suffix == ".png":
            Image.new("RGB", (9, 9)).save(path)
        else:
            path.touch()
    return folder


def splits(folder, load=sl.find_images):
    config = sl.Config(dataset="folder", data_dir=str(folder), image_size=16, patch_size=8)
    return [load(config, split) for split in ("train", "test")]


def file_names(images):
    return [os.path.basename(path) for path, _ in images.samples]


@pytest.mark.parametrize("names, expected", [
    (["z/1.png", "é/2.png", "z/deep/3.png", "4.png"],        # loose images: the root's name
     {"root": ["4.png"], "z": ["1.png", "3.png"], "é": ["2.png"]}),
    (["a/1.PNG", "a/2.Jpg", "a/3.jfif", "a/4.h5", "phone/5.HEIC", "6.pdf"],
     {"a": ["1.PNG", "2.Jpg", "3.jfif"]}),
    (["a/1.png", "a/.2.png", "a/._3.png", ".b/4.png", "__MACOSX/a/5.png"], {"a": ["1.png"]}),
    (["a/1.png", "runs/x/config.json", "runs/x/checkpoint.pt", "runs/x/samples.png"],
     {"a": ["1.png"]}),
    (["a/1.png", "a/config.json"], {"a": ["1.png"]}),        # of another program
    ([os.fsdecode(b"caf\xe8/1.png"), os.fsdecode(b"caf\xe9/2.png")],         # not UTF-8
     {"caf\\udce8": ["1.png"], "caf\\udce9": ["2.png"]}),
    (["a/1.png", "b -> ../elsewhere"], {"a": ["1.png"], "b": ["9.png"]}),
    (["a/1.png", "a/x -> .", "a/y -> ..", "a/z -> ../.."], {"a": ["1.png"]}),            # loops
    (["a/1.png", "a/x -> ../b", "b/2.png", "b/x -> ../a"],
     {"a": ["1.png", "2.png"], "b": ["2.png", "1.png"]})])
def test_what_is_found_in_a_folder(tmp_path, capsys, names, expected):
    fill(tmp_path, "elsewhere/9.png")
    found = sl.find_image_files(str(fill(tmp_path / "root", *names)))
    assert {name: list(map(os.path.basename, paths)) for name, paths in found.items()} == expected
    assert ("phone holds no image" in capsys.readouterr().out) == ("phone/5.HEIC" in names)


def test_a_tenth_is_held_out_by_name_wherever_the_folder_lies(tmp_path):
    parts = []
    for place in ("here", "there"):
        names = [f"{c} {place}/{c}{i}.png" for c in "ab" for i in range(40)]
        parts.append(list(map(file_names, splits(fill(tmp_path / place, *names)))))
    train, test = parts[0]
    assert len(test) == 8 and len({*train, *test}) == 80 and parts[0] == parts[1]


def test_the_last_image_of_a_class_is_not_held_out(tmp_path):
    train, test = splits(fill(tmp_path, *[f"{i}/{i}.png" for i in range(50)], "0/more.png"))
    assert train.labels.unique().tolist() == list(range(50))


@pytest.mark.parametrize("name", ["val", "test"])
def test_folders_train_and_val_are_the_split(tmp_path, name):
    fill(tmp_path, *[f"train/{c}/{i}.png" for c in "ab" for i in range(30)])
    train, test = splits(fill(tmp_path, *[f"{name}/{c}/{i}.png" for c in "ab" for i in range(2)]))
    assert train.classes == test.classes == ["a", "b"]
    assert train.labels.bincount().tolist() == [30, 30] and test.labels.tolist() == [0, 0, 1, 1]


UPRIGHT = np.array([[0, 80], [160, 240]], np.uint8).repeat(8, 0).repeat(8, 1)
STORED = [UPRIGHT, UPRIGHT[:, ::-1], UPRIGHT[::-1, ::-1], UPRIGHT[::-1], UPRIGHT.T,
          np.rot90(UPRIGHT), UPRIGHT[::-1, ::-1].T, np.rot90(UPRIGHT, -1)]       # EXIF 1 to 8
CHECKERBOARD = (np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)


def plain(mode, color, size=(9, 9)):
    return Image.new(mode, size, color)


def green_middle(width, height):
    image, side = plain("RGB", "red", (width, height)), min(width, height)
    image.paste((0, 60, 0), ((width - side) // 2, (height - side) // 2,
                             (width + side) // 2, (height + side) // 2))
    return image


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("image, ending, options, expected", [
    (plain("RGB", (200, 0, 9)), "png", {}, (200, 0, 9)), (plain("L", 77), "png", {}, 77),
    (plain("1", 1), "png", {}, 255), (plain("P", 0), "gif", {}, 0),
    (plain("CMYK", (0, 255, 0, 0)), "tiff", {}, (255, 0, 255)),
    (plain("CMYK", (0, 0, 0, 255)), "jpg", {}, 0),
    (plain("P", 0), "png", {"transparency": 0}, 255),        # over white
    (plain("RGBA", (0, 100, 200, 128)), "png", {}, (127, 177, 227)),
    (plain("RGBA", (9, 9, 9, 0)), "webp", {}, 255), (plain("LA", (9, 0)), "png", {}, 255),
    *[(green_middle(*size), "png", {}, (0, 60, 0)) for size in ((1, 1), (3000, 2), (18, 400))],
    (Image.fromarray(CHECKERBOARD), "png", {}, 127.5),       # antialiased
    *[(plain("RGB", 0), ending, {"exif": b"Exif\0\0not exif"}, 0) for ending in ("png", "webp")],
    *[(Image.fromarray(stored.copy()), ending, {"exif": orientation(number)}, UPRIGHT[..., None])
      for number, stored in enumerate(STORED, 1) for ending in ("jpg", "png", "webp", "tiff")]])
def test_an_image_becomes_an_upright_square_over_white(tmp_path, image, ending, options, expected):
    image.save(tmp_path / f"a.{ending}", **options)
    x, _ = sl.ImageFiles([(tmp_path / f"a.{ending}", 0)], ["a"], 16)[0]
    assert np.abs(255 * x.permute(1, 2, 0).numpy() - np.array(expected)).mean() < 3


def test_a_photograph_of_108_million_pixels_is_used(tmp_path):
    plain("L", 0, (12_000, 9_000)).save(tmp_path / "a.jpg")
    assert 128 <= min(sl.open_image(tmp_path / "a.jpg", 64).size) < 2000     # not decoded in full


def test_cifar10_is_scaled_with_antialiasing(monkeypatch):
    data = types.SimpleNamespace(data=CHECKERBOARD[None, :, :, None].repeat(3, -1), targets=[1],
                                 classes=["cat", "dog"])
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *_, **options: data)
    image, label = sl.load_images(sl.Config(dataset="cifar10", image_size=16), "test")[0]
    assert (image - 0.5).abs().max() < 0.01 and label == 1


def cut(path):
    Image.effect_noise((99, 99), 50).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("spoil", [
    lambda path: path.touch(), lambda path: path.write_text("dear diary"), cut,
    lambda path: plain("I;16", 0).save(path, "PNG"),         # 16 bits: the range is not known
    lambda path: plain("F", 0).save(path, "TIFF")])
def test_a_file_that_cannot_be_used_is_named_and_skipped(tmp_path, capsys, spoil):
    spoil(fill(tmp_path, *[f"{i}.png" for i in range(30)]) / "broken.jpg")
    assert sum(map(len, splits(tmp_path, sl.load_images))) == 30
    assert capsys.readouterr().err.count(f"skipped: {tmp_path / 'broken.jpg'}") == 1


def test_too_many_of_them_are_an_error_that_names_their_folder(tmp_path, capsys):
    fill(tmp_path, *[f"good/{i}.png" for i in range(200)], *[f"bad/{i}.jpg" for i in range(20)])
    with pytest.raises(sl.UserError, match=rf"\d+ of \d+ images cannot.*{tmp_path}/bad"):
        splits(tmp_path, sl.load_images)
    assert capsys.readouterr().err.count("skipped") <= 10


@pytest.mark.parametrize("in_memory", [8e9, 0])
def test_a_class_whose_only_image_is_broken_is_refused(tmp_path, capsys, monkeypatch, in_memory):
    monkeypatch.setattr(sl, "IN_MEMORY", in_memory)          # 0: images stay in their files
    data = fill(tmp_path / "data", *[f"a/{i}.png" for i in range(8)], "b/broken.jpg")
    assert sl.main(["train", *SMALL, "--data-dir", str(data), "--out", str(tmp_path / "run")]) == 2
    assert "b/broken.jpg" in capsys.readouterr().err


def test_batches_depend_on_seed_and_step_alone():
    def batches(first, seed=0):
        return list(sl.random_index_batches(20, sl.Config(batch_size=6, seed=seed), first, 30))
    assert batches(0)[3:] == batches(3) and batches(0) != batches(0, seed=1)
    assert len(set(map(tuple, batches(0)))) == 30 and set(sum(batches(0), [])) == set(range(20))
