"""Drawn flowers, and folders of images as people have them."""
import os

import numpy as np
import pytest
import torch
import torchvision
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


def splits(folder, load=sl.load_images, **settings):
    config = sl.Config(**{"dataset": "folder", "data_dir": str(folder), "image_size": 16,
                          "patch_size": 8, **settings})
    return [load(config, split) for split in ("train", "test")]


def file_names(images):
    return [os.path.basename(path) for path, _ in images.samples]


def test_drawings_are_the_same_for_a_seed_and_others_in_each_split(whole):
    train, test, again = [sl.drawn_images(split, 8) for split in ("train", "test", "test")]
    assert torch.equal(test.pixels, again.pixels)
    assert not torch.equal(test.pixels, sl.drawn_images("test", 8, seed=1).pixels)
    assert len({image.numpy().tobytes() for image in (*train.pixels, *test.pixels)}) == 7200


@pytest.mark.parametrize("names, expected", [
    (["z/1.png", "é/2.png", "z/deep/3.png", "4.png"],        # loose images: the root's name
     {"root": ["4.png"], "z": ["1.png", "3.png"], "é": ["2.png"]}),
    (["a/1.PNG", "a/2.Jpg", "a/3.jfif", "a/4.webp", "a/5.h5", "b/6.mpg", "7.pdf"],
     {"a": ["1.PNG", "2.Jpg", "3.jfif", "4.webp"]}),
    (["a/1.png", "a/.2.png", "a/._3.png", ".b/4.png", "__MACOSX/a/5.png"], {"a": ["1.png"]}),
    (["a/1.png", "runs/x/config.json", "runs/x/checkpoint.pt", "runs/x/samples.png"],
     {"a": ["1.png"]}),
    (["a/1.png", "a/config.json"], {"a": ["1.png"]}),        # of another program
    (["a/1.png", "b -> ../elsewhere"], {"a": ["1.png"], "b": ["9.png"]}),
    (["a/1.png", "a/x -> .", "a/y -> ..", "a/z -> ../.."], {"a": ["1.png"]}),            # loops
    (["a/1.png", "a/x -> ../b", "b/2.png", "b/x -> ../a"],
     {"a": ["1.png", "2.png"], "b": ["2.png", "1.png"]})])
def test_what_is_found_in_a_folder(tmp_path, names, expected):
    fill(tmp_path, "elsewhere/9.png")
    found = sl.find_image_files(str(fill(tmp_path / "root", *names)))
    assert {name: list(map(os.path.basename, paths)) for name, paths in found.items()} == expected


def test_names_that_are_not_utf_8_stay_apart(tmp_path):
    for number, name in enumerate((b"caf\xe8", b"caf\xe9")):
        fill(tmp_path / os.fsdecode(name), f"{number}.png")
    names = list(sl.find_image_files(str(tmp_path)))
    assert len(names) == 2 and "".join(names).encode()       # and can be printed


def test_a_class_folder_without_an_image_is_named_once(tmp_path, capsys):
    train, _ = splits(fill(tmp_path, *[f"a/{i}.png" for i in range(4)], "phone/1.HEIC"))
    said = capsys.readouterr().out
    assert train.classes == ["a"] and said.count("phone") == 1 and "1.HEIC" in said


def test_a_tenth_is_held_out_by_name_wherever_the_folder_lies(tmp_path):
    files = [f"{name}/{name}{i}.png" for name in "ab" for i in range(40)]
    (train, test), moved = [list(map(file_names, splits(fill(tmp_path / place, *files), sl.find_images)))
                            for place in ("here", "there")]
    assert len(test) == 8 and len({*train, *test}) == 80 and moved == [train, test]


def test_images_that_are_added_move_no_other_from_one_part_to_the_other(tmp_path):
    _, before = splits(fill(tmp_path, *[f"{i}.png" for i in range(60)]), sl.find_images)
    _, after = splits(fill(tmp_path, *[f"{i}.png" for i in range(60, 90)]), sl.find_images)
    old = [name for name in file_names(after) if int(name[:-4]) < 60]
    assert old == file_names(before) and len(after) > len(before)


def test_the_last_image_of_a_class_is_not_held_out(tmp_path):
    train, test = splits(fill(tmp_path, *[f"{i}/a{i % 25}.png" for i in range(50)]))
    assert train.labels.unique().tolist() == list(range(50))


@pytest.mark.parametrize("count", [4, 19])
def test_few_images_serve_both_purposes(tmp_path, count):
    train, test = splits(fill(tmp_path, *[f"{i}.png" for i in range(count)]))
    assert len(train) == len(test) == count and train.classes == [tmp_path.name]


@pytest.mark.parametrize("name", ["val", "test"])
def test_folders_train_and_val_are_the_split(tmp_path, name):
    fill(tmp_path, *[f"train/{c}/{i}.png" for c in "ab" for i in range(30)])
    train, test = splits(fill(tmp_path, *[f"{name}/{c}/{i}.png" for c in "ab" for i in range(2)]))
    assert train.classes == test.classes == ["a", "b"]
    assert train.labels.bincount().tolist() == [30, 30] and test.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("mode, ending, color, options, expected", [
    ("RGB", "png", (200, 0, 9), {}, (200, 0, 9)), ("L", "png", 77, {}, (77, 77, 77)),
    ("1", "png", 1, {}, (255, 255, 255)), ("CMYK", "tiff", (0, 255, 0, 0), {}, (255, 0, 255)),
    ("CMYK", "jpg", (0, 0, 0, 255), {}, (0, 0, 0)),
    ("P", "gif", 0, {}, (0, 0, 0)), ("P", "png", 0, {"transparency": 0}, (255, 255, 255)),
    ("RGBA", "png", (0, 100, 200, 128), {}, (127, 177, 227)),                # over white
    ("RGBA", "webp", (9, 9, 9, 0), {}, (255, 255, 255)),
    ("LA", "png", (9, 0), {}, (255, 255, 255)),
    # corrupt EXIF is as none
    ("RGB", "png", 9, {"exif": b"Exif\0\0junkjunk"}, (9, 0, 0)),
    ("RGB", "webp", 9, {"exif": b"Exif\0\0junkjunk", "lossless": True}, (9, 0, 0)),
    ("RGB", "jpg", 0, {"exif": b"Exif\0\0II*\0\xff\xff\xff\x7f"}, (0, 0, 0))])
def test_every_mode_becomes_rgb_over_white(tmp_path, mode, ending, color, options, expected):
    Image.new(mode, (9, 9), color).save(tmp_path / f"a.{ending}", **options)
    image = sl.open_image(tmp_path / f"a.{ending}", 8)
    assert image.mode == "RGB" and np.abs(np.array(image) - np.array(expected)).max() <= 2


UPRIGHT = np.array([[0, 80], [160, 240]], np.uint8).repeat(8, 0).repeat(8, 1)
STORED = {1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
          5: UPRIGHT.T, 6: np.rot90(UPRIGHT), 7: UPRIGHT[::-1, ::-1].T, 8: np.rot90(UPRIGHT, -1)}


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(STORED[orientation].copy()).save(tmp_path / f"a.{ending}", exif=exif)
    image = np.array(sl.open_image(tmp_path / f"a.{ending}", 16), float)[:, :, 0]
    assert np.abs(image - UPRIGHT).mean() < 3


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (17, 400), (400, 17)])
def test_any_shape_is_cut_to_its_middle_and_scaled(tmp_path, size):
    image, side = Image.new("RGB", size, "red"), min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste((0, 60, 0), (left, top, left + side, top + side))
    image.save(tmp_path / "a.png")
    x, _ = sl.ImageFiles([(tmp_path / "a.png", 0)], ["a"], 16)[0]
    torch.testing.assert_close(255 * x, torch.tensor([0, 60.0, 0]).view(3, 1, 1).expand(3, 16, 16),
                               rtol=0, atol=1)


@pytest.mark.parametrize("dataset", ["folder", "cifar10"])
def test_a_checkerboard_becomes_grey_when_it_is_made_smaller(tmp_path, monkeypatch, dataset):
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    for i in range(4):
        Image.fromarray(board).save(tmp_path / f"{i}.png")

    class CIFAR10:
        data, targets, classes = np.stack([board, board]), [0, 1], ["cat", "dog"]

        def __init__(self, root, train, download):
            self.train = train
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    for images in splits(tmp_path, dataset=dataset):
        assert (images[1][0] - 0.5).abs().max() < 0.05


def test_a_photograph_of_108_million_pixels_is_used(tmp_path):
    Image.new("L", (12_000, 9_000)).save(tmp_path / "a.jpg")
    assert 128 <= min(sl.open_image(tmp_path / "a.jpg", 64).size) < 2000     # not decoded in full


def test_without_a_limit_of_pixels_nothing_is_a_decompression_bomb(tmp_path, monkeypatch):
    fill(tmp_path, "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(sl.UserError, match="a.png.*DecompressionBomb"):
        sl.open_image(tmp_path / "a.png", 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert sl.open_image(tmp_path / "a.png", 8).size == (9, 9)


def cut(path):
    Image.effect_noise((99, 99), 50).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("spoil", [
    lambda path: path.touch(), lambda path: path.write_text("dear diary"), cut,
    lambda path: Image.new("I;16", (9, 9)).save(path, "PNG"),                # range not known
    lambda path: Image.new("F", (9, 9)).save(path, "TIFF")])
def test_a_file_that_cannot_be_used_is_named_and_skipped(tmp_path, capsys, spoil):
    spoil(fill(tmp_path, *[f"{i}.png" for i in range(30)]) / "broken.jpg")
    assert sum(map(len, splits(tmp_path))) == 30
    assert capsys.readouterr().err.count(f"skipped: {tmp_path / 'broken.jpg'}") == 1


def test_too_many_of_them_are_an_error_that_names_their_folder(tmp_path, capsys):
    fill(tmp_path, *[f"good/{i}.png" for i in range(200)], *[f"bad/{i}.jpg" for i in range(20)])
    with pytest.raises(sl.UserError, match=rf"\d+ of \d+ images cannot.*{tmp_path}/bad"):
        splits(tmp_path)
    assert capsys.readouterr().err.count("skipped") <= 10


@pytest.mark.parametrize("in_memory", [8e9, 0])
def test_images_in_memory_and_in_files_are_the_same(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(sl, "IN_MEMORY", in_memory)
    for i in range(4):
        fill(tmp_path, f"{i}/a.png")
        Image.new("RGB", (9, 9), (50 * i, 0, 0)).save(tmp_path / f"{i}/a.png")
    images, _ = splits(tmp_path)
    (x, labels), = sl.batch_loader(images, [[3, 1]])
    assert isinstance(images, sl.PixelImages if in_memory else sl.ImageFiles)
    torch.testing.assert_close(255 * x.mean((2, 3))[:, 0], torch.tensor([150.0, 50.0]))
    assert labels.tolist() == [3, 1]


@pytest.mark.parametrize("dataset, expected", [
    ("folder", "0 images"), ("animal-faces", "stargan-v2"), ("imagenet", "image-net.org")])
def test_data_that_cannot_be_had_says_what_to_put_where(tmp_path, dataset, expected):
    with pytest.raises(sl.UserError, match=f"(?s){tmp_path}/absent.*{expected}|0 images.*absent"):
        splits(tmp_path / "absent", dataset=dataset)


def batches(first, last, **settings):
    return list(sl.random_batches(20, sl.Config(batch_size=6, **settings), first, last))


def test_batches_depend_on_seed_and_step_alone():
    assert batches(0, 9)[3:] == batches(3, 9) and batches(0, 9) != batches(0, 9, seed=1)
    assert len(set(map(tuple, batches(0, 9)))) == 9
    assert {i for batch in batches(0, 50) for i in batch} == set(range(20))


def test_processes_share_a_batch(monkeypatch):
    whole, shares = batches(3, 4)[0], []
    for number in range(3):
        monkeypatch.setattr(sl, "process_number", lambda: number)
        monkeypatch.setattr(sl, "process_count", lambda: 3)
        shares += batches(3, 4)
    assert [i for part in zip(*shares) for i in part] == whole
