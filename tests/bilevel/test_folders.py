"""Omniglot and CIFAR-FS loaders, on small folders that the tests write."""

import pytest
import torch

from bilevel.data.episodes import episodes
from bilevel.data.folders import cifar_fs, omniglot

Image = pytest.importorskip("PIL.Image")


def write_drawing(path, ink):
    """A 105 x 105 black-on-white 1-bit drawing with a filled square, as Omniglot's files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("1", (105, 105), 1)
    left, top, right, bottom = ink
    image.paste(0, (left, top, right, bottom))
    image.save(path)


@pytest.fixture
def drawings(tmp_path):
    for part, alphabets in {"images_background": ("Greek", "Bengali"), "images_evaluation": ("Tengwar",)}.items():
        for alphabet in alphabets:
            for character in (1, 2):
                for drawer in range(3):
                    shift = 15 * drawer
                    path = (
                        tmp_path / part / alphabet / f"character{character:02d}" / f"{character:04d}_{drawer:02d}.png"
                    )
                    write_drawing(path, (shift, 0, shift + 30, 60))
    return tmp_path


def test_omniglot_is_resized_and_inverted(drawings):
    data = omniglot(drawings)
    assert data.names == ("Bengali/character01", "Bengali/character02", "Greek/character01", "Greek/character02")
    assert data.counts == (3, 3, 3, 3)
    assert data.images.shape == (12, 1, 28, 28)
    first = data.images[0, 0]
    # the square is 30 x 60 of 105 x 105 pixels: 8 x 16 of 28 x 28, ink 255 on 0
    assert torch.equal(
        first == 255,
        torch.zeros(28, 28).index_put_((torch.arange(16)[:, None], torch.arange(8)), torch.tensor(1.0)).bool(),
    )
    assert not first[16:].any()
    assert not first[:, 8:].any()
    assert data.images[1, 0, 0].argmax() == 4


def test_omniglot_parts_and_rotations(drawings):
    assert omniglot(drawings, "evaluation").names == ("Tengwar/character01", "Tengwar/character02")
    assert len(omniglot(drawings, "all")) == 6
    turned = omniglot(drawings, rotations=True)
    assert len(turned) == 16
    assert turned.counts == (3,) * 16
    assert turned.names[4] == "Bengali/character01/rot090"
    assert torch.equal(turned.images[12:24], torch.rot90(turned.images[:12], 1, (2, 3)))
    (x, y), (query_x, _) = episodes(turned, tasks=2, way=5, shot=1, query=2)
    assert x.shape == (2, 5, 1, 28, 28)
    assert y[0].tolist() == [0, 1, 2, 3, 4]
    assert query_x.max() == 1


def test_omniglot_says_which_path_was_expected(tmp_path, drawings):
    with pytest.raises(FileNotFoundError, match=r"nowhere/images_background.*alphabet/character"):
        omniglot(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="part='train'"):
        omniglot(drawings, "train")
    (drawings / "images_evaluation" / "Ulog" / "character01").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no \*\.png files in .*Ulog/character01"):
        omniglot(drawings, "evaluation")
    (drawings / "images_evaluation" / "Ulog" / "character01" / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=r"Ulog/character01/1.png could not be read"):
        omniglot(drawings, "evaluation")
    (tmp_path / "empty" / "images_background").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no classes in"):
        omniglot(tmp_path / "empty")
    (drawings / "images_background" / "Latin").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no classes in .*images_background/Latin"):
        omniglot(drawings)
    with pytest.raises(ValueError, match="side=0"):
        omniglot(drawings, side=0)


def pixels(mode, paper, ink, **saved):
    """Writes a picture of a filled square, ink on paper, in one of the ways in which PNG files keep pixels."""
    import numpy

    def write(path):
        values = numpy.full((105, 105, *numpy.shape(paper)), paper, numpy.uint16 if mode == "I;16" else numpy.uint8)
        values[30:75, 30:75] = ink
        image = Image.fromarray(values)
        if mode == "P":
            image.putpalette([0, 0, 0, 0, 0, 0])  # both entries are black, and the first is transparent
        assert image.mode == mode
        image.save(path, "PNG", **saved)

    return write


@pytest.mark.parametrize(
    ("write", "ink"),
    [
        (pixels("L", 255, 0), 255),
        (pixels("L", 255, 100), 155),
        (pixels("RGB", (255,) * 3, (0,) * 3), 255),
        # Transparent is paper, whatever colour lies beneath.
        (pixels("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), 255),
        (pixels("LA", (0, 0), (0, 255)), 255),
        (pixels("P", 0, 1, transparency=0), 255),
        (pixels("L", 7, 0, transparency=7), 255),
        # 16 bits are scaled, not clipped.
        (pixels("I;16", 65535, 0), 255),
        (pixels("I;16", 65535, 100 << 8), 155),
    ],
)
def test_ink_is_ink_however_a_file_keeps_its_pixels(drawings, write, ink):
    folder = drawings / "images_evaluation" / "Ulog" / "character01"
    folder.mkdir(parents=True)
    write(folder / "1.png")
    image = omniglot(drawings, "evaluation").select([2]).images[0, 0]
    assert (image[0, 0].item(), image[14, 14].item(), image[27, 27].item()) == (0, ink, 0)


def test_hidden_leftovers_are_passed_over_and_capital_suffixes_read(drawings):
    folder = drawings / "images_evaluation" / "Tengwar"
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "character01" / "._0001_00.png").write_bytes(b"resource fork")
    (folder / "character01" / "notes.txt").write_text("no picture")
    (folder / "character01" / "0001_00.png").rename(folder / "character01" / "0001_00.PNG")
    assert omniglot(drawings, "evaluation").counts == (3, 3)


def test_damaged_files_are_named(drawings, monkeypatch):
    path = drawings / "images_evaluation" / "Tengwar" / "character01" / "0001_00.png"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b"\0" + whole[1:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"0001_00\.png could not be read as an image"):
            omniglot(drawings, "evaluation")
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"0001_00\.png could not be read as an image.*exceeds"):
        omniglot(drawings, "evaluation")


@pytest.fixture
def cifar(tmp_path):
    classes = {"train": ("apple", "bear", "lamp", "rose", "worm"), "val": ("can",), "test": ("fox",)}
    (tmp_path / "splits" / "bertinetto").mkdir(parents=True)
    for part, names in classes.items():
        (tmp_path / "splits" / "bertinetto" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for index, name in enumerate(names):
            folder = tmp_path / "data" / name
            folder.mkdir(parents=True)
            for image in range(4):
                Image.new("RGB", (32, 32), (10 * index, image, 200)).save(folder / f"{name}_{image}.png")
    return tmp_path


def test_cifar_fs_follows_its_lists(cifar):
    data = cifar_fs(cifar)
    assert data.names == ("apple", "bear", "lamp", "rose", "worm")
    assert data.images.shape == (20, 3, 32, 32)
    assert data.images[5, :, 3, 7].tolist() == [10, 1, 200]
    assert cifar_fs(cifar, "validation").names == ("can",)
    assert cifar_fs(cifar, "test").names == ("fox",)
    (x, _), _ = episodes(data, tasks=1, way=5, shot=1, query=3, dtype=torch.float64)
    assert x.shape == (1, 5, 3, 32, 32)
    torch.testing.assert_close(x[0, 0, 2], torch.full((32, 32), 200 / 255, dtype=torch.float64))


def test_cifar_fs_says_which_path_was_expected(tmp_path, cifar):
    with pytest.raises(FileNotFoundError, match=r"nowhere/data.*splits/bertinetto"):
        cifar_fs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split='val'"):
        cifar_fs(cifar, "val")
    listing = cifar / "splits" / "bertinetto" / "test.txt"
    listing.write_text("fox\nunicorn\n")
    with pytest.raises(FileNotFoundError, match=r"data/unicorn.*test.txt"):
        cifar_fs(cifar, "test")
    listing.write_text("fox\nfox\n")
    with pytest.raises(ValueError, match=r"test\.txt names fox more than once"):
        cifar_fs(cifar, "test")
    listing.write_text("fox\n", encoding="utf-8-sig")
    assert cifar_fs(cifar, "test").names == ("fox",)
    listing.write_text("\n")
    with pytest.raises(FileNotFoundError, match="no class names"):
        cifar_fs(cifar, "test")
    listing.unlink()
    with pytest.raises(FileNotFoundError, match=r"list of classes .*test.txt"):
        cifar_fs(cifar, "test")
    Image.new("RGB", (16, 16)).save(cifar / "data" / "can" / "can_1.png")
    with pytest.raises(ValueError, match=r"data/can/can_1.png is an image of 16 x 16 pixels; 32 x 32"):
        cifar_fs(cifar, "validation")
