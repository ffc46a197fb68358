"""Images in folders, as people have them: what is found, what is held out, what is read."""
import os

import numpy as np
import pytest
from conftest import fill
from PIL import Image

import sphere_latent as sl


def splits(folder, load=sl.find_images):
    config = sl.Config(dataset="folder", data_dir=str(folder), image_size=16, patch_size=8)
    return [load(config, split) for split in ("train", "test")]


@pytest.mark.parametrize("names, expected", [
    (["z/1.png", "é/2.png", "z/deep/3.png", "4.png"],        # loose images: the root's name
     {"root": ["4.png"], "z": ["1.png", "3.png"], "é": ["2.png"]}),
    (["a/1.PNG", "a/2.Jpg", "a/3.jfif", "a/4.h5", "5.pdf"], {"a": ["1.PNG", "2.Jpg", "3.jfif"]}),
    (["a/1.png", "a/.2.png", "a/._3.png", ".b/4.png", "__MACOSX/a/5.png"], {"a": ["1.png"]}),
    (["a/1.png", "runs/x/config.json", "runs/x/checkpoint.pt", "runs/x/samples.png"],
     {"a": ["1.png"], "runs": []})])
def test_what_is_found_in_a_folder(tmp_path, names, expected):
    found = sl.find_image_files(str(fill(tmp_path / "root", *names)))
    assert {name: list(map(os.path.basename, paths)) for name, paths in found.items()} == expected


def test_a_tenth_is_held_out_by_name_wherever_the_folder_lies(tmp_path):
    parts = []
    for place in ("here", "there"):
        fill(tmp_path / place, *[f"{c} {place}/{c}{i}.png" for c in "ab" for i in range(40)])
        parts.append([[os.path.basename(path) for path, _ in images.samples]
                      for images in splits(tmp_path / place)])
    train, test = parts[0]
    assert (len(train), len(test), len({*train, *test})) == (72, 8, 80) and parts[0] == parts[1]


def test_folders_train_and_val_are_the_split(tmp_path):
    train, _ = splits(fill(tmp_path, *[f"x/train/{c}/{i}.png" for c in "ab" for i in range(30)]))
    assert train.classes == ["a", "b"]                       # not one class "x" or "train"
    train, test = splits(fill(tmp_path, *[f"x/val/{c}/{i}.png" for c in "ab" for i in range(2)]))
    assert train.classes == test.classes == ["a", "b"]
    assert train.labels.bincount().tolist() == [30, 30] and test.labels.tolist() == [0, 0, 1, 1]


QUARTERS = np.array([[0, 80], [160, 240]], np.uint8).repeat(8, 0).repeat(8, 1)
CHECKERBOARD = (np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)
TURNED = Image.Exif()
TURNED[0x0112] = 6                                           # as a phone held upright writes it
WIDE = Image.new("RGB", (400, 18), "red")
WIDE.paste((0, 60, 0), (191, 0, 209, 18))                    # the square in the middle


@pytest.mark.parametrize("image, ending, options, expected", [
    (Image.new("CMYK", (9, 9), (0, 255, 0, 0)), "tiff", {}, (255, 0, 255)),
    (Image.new("RGBA", (9, 9), (0, 100, 200, 128)), "png", {}, (127, 177, 227)),
    (Image.new("RGB", (1, 1), (200, 0, 9)), "png", {}, (200, 0, 9)),
    (WIDE, "png", {}, (0, 60, 0)),
    (Image.fromarray(CHECKERBOARD), "png", {}, 127.5),       # antialiased
    (Image.fromarray(np.rot90(QUARTERS).copy()), "jpg", {"exif": TURNED}, QUARTERS[..., None])])
def test_an_image_becomes_an_upright_square_over_white(tmp_path, image, ending, options, expected):
    image.save(tmp_path / f"a.{ending}", **options)
    x, _ = sl.ImageFiles([(tmp_path / f"a.{ending}", 0)], ["a"], 16)[0]
    assert np.abs(255 * x.permute(1, 2, 0).numpy() - np.array(expected)).mean() < 3


def cut(path):
    Image.effect_noise((99, 99), 50).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("spoil", [
    cut, lambda path: path.write_text("dear diary"),
    lambda path: Image.new("I;16", (9, 9)).save(path, "PNG")])       # 16 bits: the range is unknown
def test_a_file_that_cannot_be_used_is_named_and_skipped(tmp_path, capsys, spoil):
    spoil(fill(tmp_path, *[f"{i}.png" for i in range(30)]) / "broken.jpg")
    assert sum(map(len, splits(tmp_path, sl.load_images))) == 30
    assert capsys.readouterr().err.count(f"skipped: {tmp_path / 'broken.jpg'}") == 1


def test_too_many_of_them_are_an_error_that_names_their_folder(tmp_path):
    fill(tmp_path, *[f"good/{i}.png" for i in range(200)], *[f"bad/{i}.jpg" for i in range(20)])
    with pytest.raises(sl.UserError, match=rf"\d+ of \d+ images cannot.*{tmp_path}/bad"):
        splits(tmp_path, sl.load_images)


def test_links_are_followed_and_loops_are_not(tmp_path):
    fill(tmp_path, "root/a/1.png", "elsewhere/2.png")
    (tmp_path / "root/b").symlink_to("../elsewhere")
    (tmp_path / "root/a/loop").symlink_to("..")
    found = sl.find_image_files(str(tmp_path / "root"))
    assert {name: len(paths) for name, paths in found.items()} == {"a": 1, "b": 1}
