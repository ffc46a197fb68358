"""Drawn flowers, and folders of images as people have them."""
import os
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import sphere_latent as sl


def save(path, mode="RGB", size=(9, 9), color=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


def fill(folder, *names):
    """Image files in a folder, which they share with whatever else is there."""
    for name in names:
        save(folder / name)
    return folder


def config_for(folder, **settings):
    return sl.Config(dataset="folder", data_dir=str(folder), image_size=16, patch_size=8, **settings)


def both_splits(folder):
    return [sl.load_images(config_for(folder), split) for split in ("train", "test")]


def found(folder):
    """{class: names of its files}"""
    files = sl.find_image_files(str(folder))
    return {name: [os.path.basename(path) for path in paths] for name, paths in files.items()}


def test_drawings_are_the_same_for_a_seed_and_others_in_each_split(whole):
    train, test, again = [sl.drawn_images(split, 8) for split in ("train", "test", "test")]
    assert torch.equal(test.pixels, again.pixels) and not torch.equal(
        test.pixels, sl.drawn_images("test", 8, seed=1).pixels)
    assert len(train) == 6000 and len(test) == 1200 and len(test.classes) == 12
    assert len({image.numpy().tobytes() for image in (*train.pixels, *test.pixels)}) == 7200
    image, label = test[5]
    assert image.shape == (3, 8, 8) and 0.5 < image.max() <= 1 and label == 5


# ---- what is found in a folder

@pytest.mark.parametrize("name, is_found", [
    ("a.png", True), ("A.JPG", True), ("b.jfif", True), ("deep/er/c.webp", True), (".d.png", False),
    ("._e.png", False), (".f/g.png", False), ("__MACOSX/h.png", False), ("i.h5", False),
    ("j.mpg", False), ("k.pdf", False)])
def test_which_files_are_images(tmp_path, name, is_found):
    fill(tmp_path, "class/1.png")
    (tmp_path / "class" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "class" / name).touch()
    assert (os.path.basename(name) in found(tmp_path)["class"]) == is_found


def test_folders_are_classes_and_images_beside_them_are_one_of_the_name_of_the_root(tmp_path):
    root = fill(tmp_path / "root", "z/1.png", "é/2.png", "z/deep/3.png", "4.png")
    assert found(root) == {"root": ["4.png"], "z": ["1.png", "3.png"], "é": ["2.png"]}


def test_a_run_folder_is_never_read(tmp_path, small_run):
    shutil.copytree(small_run, fill(tmp_path, "a/1.png") / "runs" / "mine")
    assert list(found(tmp_path)) == ["a"]


def test_a_config_of_another_program_hides_no_images(tmp_path):
    (fill(tmp_path, "a/1.png", "b/2.png") / "a" / "config.json").write_text("{}")
    assert list(found(tmp_path)) == ["a", "b"]


def test_a_link_to_a_folder_is_followed(tmp_path):
    fill(tmp_path / "elsewhere", "1.png")
    fill(tmp_path / "root", "a/2.png")
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "root") == {"a": ["2.png"], "b": ["1.png"]}


@pytest.mark.parametrize("target", [".", "..", "../..", "../b"])
def test_a_loop_of_links_is_walked_once(tmp_path, target):
    root = fill(tmp_path / "root", "a/1.png", "b/2.png")
    (root / "a/link").symlink_to(target)
    (root / "b/link").symlink_to("../a")
    files = found(root)
    assert set(files["a"]) == ({"1.png", "2.png"} if target == "../b" else {"1.png"})
    assert len(files["a"]) == len(set(files["a"])) and set(files["b"]) == {"1.png", "2.png"}


def test_names_that_are_not_utf_8_stay_apart(tmp_path):
    for name in (b"caf\xe8", b"caf\xe9"):
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
        shutil.copy(fill(tmp_path / "x", "1.png") / "1.png",
                    os.path.join(os.fsencode(tmp_path), name))
    names = list(found(tmp_path))
    assert len(names) == 3 and "".join(names).encode("utf-8")


def test_a_folder_without_an_image_that_can_be_used_is_named_once(tmp_path, capsys):
    fill(tmp_path, *[f"a/{i}.png" for i in range(4)])
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/1.HEIC").touch()
    assert both_splits(tmp_path)[0].classes == ["a"]
    said = capsys.readouterr().out
    assert said.count("phone") == 1 and "1.HEIC" in said


# ---- the split

def test_a_tenth_is_held_out_by_name_wherever_the_folder_lies(tmp_path):
    fill(tmp_path / "here", *[f"{name}/{name}{i}.png" for name in "ab" for i in range(40)])
    train, test = [{os.path.basename(path) for path, _ in sl.find_images(
        config_for(tmp_path / "here"), split).samples} for split in ("train", "test")]
    assert len(test) == 8 and len(train | test) == 80 and not train & test
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = sl.find_images(config_for(tmp_path / "there"), "test").samples
    assert {os.path.basename(path) for path, _ in moved} == test


def test_the_last_image_of_a_class_is_not_held_out(tmp_path):
    fill(tmp_path, *[f"{i}/{i}.png" for i in range(30)], "0/more.png", "1/more.png", "2/more.png")
    train, test = both_splits(tmp_path)
    assert set(train.labels.tolist()) == set(range(30)) and len(test) == 3


@pytest.mark.parametrize("count", [4, 19])
def test_few_images_serve_both_purposes(tmp_path, count):
    train, test = both_splits(fill(tmp_path, *[f"{i}.png" for i in range(count)]))
    assert len(train) == len(test) == count and train.classes == [tmp_path.name]


@pytest.mark.parametrize("name", ["val", "test"])
def test_folders_train_and_val_are_the_split(tmp_path, name):
    fill(tmp_path, *[f"train/{c}/{i}.png" for c in "ab" for i in range(30)])
    fill(tmp_path, *[f"{name}/{c}/{i}.png" for c in "ab" for i in range(2)])
    train, test = both_splits(tmp_path)
    assert train.classes == test.classes == ["a", "b"]
    assert train.labels.bincount().tolist() == [30, 30]
    assert test.labels.bincount().tolist() == [2, 2]


# ---- one file

@pytest.mark.parametrize("mode, ending, color, expected", [
    ("RGB", "png", (200, 0, 9), (200, 0, 9)), ("L", "png", 77, (77, 77, 77)),
    ("P", "gif", 0, (0, 0, 0)), ("1", "png", 1, (255, 255, 255)),
    ("CMYK", "jpg", (0, 0, 0, 0), (255, 255, 255)), ("CMYK", "tiff", (0, 255, 0, 0), (255, 0, 255)),
    ("RGBA", "png", (0, 100, 200, 128), (127, 177, 227)),                    # over white
    ("RGBA", "webp", (9, 9, 9, 0), (255, 255, 255)), ("LA", "png", (9, 0), (255, 255, 255))])
def test_every_mode_becomes_rgb_over_white(tmp_path, mode, ending, color, expected):
    save(tmp_path / f"a.{ending}", mode, color=color)
    image = sl.open_image(tmp_path / f"a.{ending}", 8)
    assert image.mode == "RGB" and np.abs(np.array(image) - np.array(expected)).max() <= 2


def test_a_transparent_colour_of_a_palette_becomes_white(tmp_path):
    save(tmp_path / "a.png", "P", transparency=0)
    assert np.array(sl.open_image(tmp_path / "a.png", 8)).min() == 255


@pytest.mark.parametrize("mode, ending", [("I;16", "png"), ("F", "tiff"), ("I", "tiff")])
def test_more_than_8_bits_a_channel_is_refused(tmp_path, mode, ending):
    """Their range is not known, so any conversion would be a guess."""
    save(tmp_path / f"a.{ending}", mode)
    with pytest.raises(sl.UserError, match=f"a.{ending} cannot be read.*8 bits"):
        sl.open_image(tmp_path / f"a.{ending}", 8)


UPRIGHT = np.array([[0, 80], [160, 240]], np.uint8).repeat(8, 0).repeat(8, 1)
STORED = {1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
          5: UPRIGHT.T, 6: np.rot90(UPRIGHT), 7: UPRIGHT[::-1, ::-1].T, 8: np.rot90(UPRIGHT, -1)}


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(path, exif=exif)
    image = np.array(sl.open_image(path, 16))[:, :, 0].astype(float)
    assert np.abs(image - UPRIGHT).mean() < 3


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0junkjunk", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
def test_an_image_with_corrupt_exif_is_used(tmp_path, ending, exif):
    save(tmp_path / f"a.{ending}", exif=exif)
    assert sl.open_image(tmp_path / f"a.{ending}", 8).size == (9, 9)


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (17, 400)])
def test_any_shape_is_cut_to_its_middle_and_scaled(tmp_path, size):
    image = Image.new("RGB", size, "red")
    side, middle = min(size), Image.new("RGB", (min(size), min(size)), (0, 60, 0))
    image.paste(middle, ((size[0] - side) // 2, (size[1] - side) // 2))
    image.save(tmp_path / "a.png")
    x, _ = sl.ImageFiles([(tmp_path / "a.png", 0)], ["a"], 16)[0]
    assert x.shape == (3, 16, 16)
    torch.testing.assert_close(255 * x.mean((1, 2)), torch.tensor([0, 60.0, 0]), rtol=0, atol=9)


def test_a_checkerboard_becomes_grey_when_it_is_made_smaller(tmp_path):
    board = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    Image.fromarray(board).save(tmp_path / "a.png")
    x, _ = sl.ImageFiles([(tmp_path / "a.png", 0)], ["a"], 16)[0]
    assert (x - 0.5).abs().max() < 0.05


def test_a_photograph_of_108_million_pixels_is_used(tmp_path):
    save(tmp_path / "a.jpg", "L", size=(12_000, 9_000))
    assert min(sl.open_image(tmp_path / "a.jpg", 64).size) >= 128            # not decoded in full


@pytest.mark.parametrize("limit, refused", [(60, True), (None, False)])
def test_a_decompression_bomb_is_refused_unless_there_is_no_limit(tmp_path, monkeypatch, limit,
                                                                  refused):
    save(tmp_path / "a.png", size=(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if refused:
        with pytest.raises(sl.UserError, match="a.png.*DecompressionBomb"):
            sl.open_image(tmp_path / "a.png", 8)
    else:
        assert sl.open_image(tmp_path / "a.png", 8).size == (20, 20)


# ---- files that cannot be read

def truncated(path):
    Image.effect_noise((99, 99), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("spoil", [lambda path: path.touch(), lambda path: path.write_text("dear"),
                                   truncated])
def test_a_file_that_cannot_be_read_is_named_and_skipped(tmp_path, capsys, spoil):
    spoil(fill(tmp_path, *[f"{i}.png" for i in range(30)]) / "broken.jpg")
    assert sum(map(len, both_splits(tmp_path))) == 30
    assert capsys.readouterr().err.count(str(tmp_path / "broken.jpg")) == 1


def test_too_many_of_them_are_an_error_that_names_their_folder(tmp_path, capsys):
    fill(tmp_path, *[f"good/{i}.png" for i in range(200)])
    (tmp_path / "pointers").mkdir()
    for i in range(20):
        (tmp_path / f"pointers/{i}.png").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(sl.UserError, match=rf"\d+ of 198 images cannot.*{tmp_path}/pointers"):
        sl.load_images(config_for(tmp_path), "train")
    assert capsys.readouterr().err.count("skipped") == 5


def test_images_too_many_for_memory_stay_in_their_files(tmp_path, monkeypatch):
    for i in range(8):
        save(tmp_path / f"{i}.png", color=(30 * i, 0, 0))
    in_memory = both_splits(tmp_path)[0]
    monkeypatch.setattr(sl, "IN_MEMORY", 0)
    in_files = both_splits(tmp_path)[0]
    assert isinstance(in_files, sl.ImageFiles) and in_files.classes == in_memory.classes
    (a, labels_a), (b, labels_b) = [next(iter(sl.batch_loader(images, [[5, 2]])))
                                    for images in (in_memory, in_files)]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert torch.equal(labels_a, labels_b)


# ---- data sets with a name

@pytest.mark.parametrize("size", [16, 64])
def test_cifar10_is_scaled_with_antialiasing(monkeypatch, size):
    class Checkerboards:
        classes, targets = ["cat", "dog"], [0, 1]

        def __init__(self, root, train, download):
            board = np.indices((32, 32)).sum(0) % 2 * 255
            self.data = np.stack(2 * [board.astype(np.uint8)])[..., None].repeat(3, -1)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Checkerboards)
    image, label = sl.load_images(sl.Config(dataset="cifar10", image_size=size), "test")[1]
    assert image.shape == (3, size, size) and label == 1
    middle = image[:, 4:-4, 4:-4]
    assert (middle - 0.5).abs().max() < (0.02 if size == 16 else 0.6)
    assert image.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("autoencoder, counts", [("dinov2-b", (30, 30)), ("tiny", (27, 3))])
def test_flowers_are_all_three_parts_of_oxford_flowers(tmp_path, monkeypatch, autoencoder, counts):
    class Flowers:
        classes = ["rose", "iris"]

        def __init__(self, root, split, download):
            numbers = {"train": range(4), "val": range(4, 10), "test": range(10, 30)}[split]
            self._image_files, self._labels = [tmp_path / f"{i}.jpg" for i in numbers], [
                i % 2 for i in numbers]
    fill(tmp_path, *[f"{i}.jpg" for i in range(30)])
    monkeypatch.setattr(torchvision.datasets, "Flowers102", Flowers)
    config = sl.Config(dataset="flowers", autoencoder=autoencoder, image_size=256)
    splits = [sl.find_images(config, split) for split in ("train", "test")]
    assert tuple(map(len, splits)) == counts
    assert {os.path.basename(path) for images in splits for path, _ in images.samples} == {
        f"{i}.jpg" for i in range(30)}


@pytest.mark.parametrize("dataset, expected", [
    ("folder", "0 images"), ("cifar10", "cifar-10-python.tar.gz"), ("flowers", "102flowers.tgz"),
    ("animal-faces", "stargan-v2"), ("imagenet", "image-net.org")])
def test_data_that_cannot_be_had_says_what_to_put_where(tmp_path, monkeypatch, dataset, expected):
    def refuse(*args, **kwargs):
        raise OSError("no network")
    for name in ("CIFAR10", "Flowers102"):
        monkeypatch.setattr(torchvision.datasets, name, refuse)
    with pytest.raises(sl.UserError) as error:
        sl.find_images(sl.Config(dataset=dataset, data_dir=str(tmp_path / "absent")), "train")
    said = str(error.value)
    assert expected in said and str(tmp_path / "absent") in said and "--data-dir" in said


# ---- batches

def batches(first, last, count=100, **settings):
    return list(sl.random_batches(count, sl.Config(batch_size=6, **settings), first, last))


def test_batches_depend_on_seed_and_step_alone():
    assert batches(0, 5)[3:] == batches(3, 5) and batches(0, 5) != batches(0, 5, seed=1)
    assert len({tuple(batch) for batch in batches(0, 5)}) == 5
    assert {i for batch in batches(0, 99, count=7) for i in batch} == set(range(7))


def test_processes_share_a_batch(monkeypatch):
    whole, = batches(3, 4)
    parts = []
    for number in range(3):
        monkeypatch.setattr(sl, "process_number", lambda: number)
        monkeypatch.setattr(sl, "process_count", lambda: 3)
        parts += batches(3, 4)
    assert [i for share in zip(*parts) for i in share] == whole
