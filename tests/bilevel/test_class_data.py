"""Data by class: from arrays, from torch Datasets, from folders, pickles and lists; splits that share no class."""

import collections
import io
import os
import pickle

import pytest
import torch

from bilevel.data import ClassSet, DatasetClasses, Episodes, ImageSet, disjoint
from bilevel.data.folders import by_list, image_folder, omniglot
from bilevel.data.pickled import fc100, mini_imagenet

numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")


# --- from arrays


@pytest.mark.parametrize(
    "labels",
    [
        [5, -1, 5, 2, -1],
        (5, -1, 5, 2, -1),
        torch.tensor([5, -1, 5, 2, -1]),
        torch.tensor([5, -1, 5, 2, -1], dtype=torch.int8),
        numpy.array([5, -1, 5, 2, -1]),
        numpy.array([5, -1, 5, 2, -1], dtype=">i2"),
        list(numpy.array([5, -1, 5, 2, -1])),
        list(torch.tensor([5, -1, 5, 2, -1])),
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        torch.tensor,
        numpy.array,
        list,
        lambda x: torch.tensor(x).unbind(),
        lambda x: numpy.array(x)[::-1][::-1],
        lambda x: numpy.array(x, dtype=">f4"),
    ],
)
def test_examples_are_grouped_by_label_and_keep_their_order(kind, labels):
    data = ClassSet.of(kind([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5], [3.0, 3.5], [4.0, 4.5]]), labels)
    assert (data.names, data.counts) == (("-1", "2", "5"), (2, 1, 2))
    assert data.examples[:, 0].tolist() == [1, 4, 3, 0, 2]
    assert data.labels.tolist() == [0, 0, 1, 2, 2]
    assert (len(data), data.starts()) == (3, [0, 2, 3])


def test_labels_of_texts_and_names():
    x = torch.arange(4)
    assert ClassSet.of(x, ["b", "a", "b", "a"]).names == ("a", "b")
    assert ClassSet.of(x, numpy.array(["b", "a", "b", "a"])).names == ("a", "b")
    assert ClassSet.of(x, [1, 0, 1, 0], names=["zero", "one"]).names == ("zero", "one")
    assert ClassSet.of(x, [1, 7, 1, 7], names={7: "seven", 1: "one"}).names == ("one", "seven")
    assert ClassSet.of(x, torch.tensor([True, False, True, True])).counts == (1, 3)
    # Ten comes after two.
    assert ClassSet.of(x, [10, 2, 10, 2]).names == ("2", "10")
    with pytest.raises(ValueError, match="names for 0, 1, but none for 7"):
        ClassSet.of(x, [1, 7, 1, 7], names=["zero", "one"])
    with pytest.raises(ValueError, match="'same' more than once; each class needs a name of its own"):
        ClassSet.of(x, [0, 1, 0, 1], names=["same", "same"])


def test_the_data_share_nothing_with_what_was_given():
    for x in (torch.ones(4, 2, requires_grad=True), numpy.ones((4, 2))):
        data = ClassSet.of(x, [0, 0, 1, 1])
        if isinstance(x, torch.Tensor):
            x = x.detach()
        x[:] = 5
        assert not data.examples.requires_grad
        assert torch.equal(data.examples, torch.ones(4, 2, dtype=data.examples.dtype))
    fixed = numpy.ones((4, 2))
    fixed.flags.writeable = False  # torch warns of those, and warnings are errors here
    ClassSet.of(fixed, [0, 0, 1, 1])


def test_select_named_and_split():
    data = ClassSet.of(torch.arange(10), torch.arange(10) % 5, names="abcde")
    chosen = data.select([3, -5])
    assert (chosen.names, chosen.examples.tolist()) == (("d", "a"), [3, 8, 0, 5])
    assert data.named(["e", "b"]).examples.tolist() == [4, 9, 1, 6]
    parts = data.split((0.4, 0.2, 0.4), seed=1)
    assert [len(part) for part in parts.values()] == [2, 1, 2]
    assert sorted(name for part in parts.values() for name in part.names) == list("abcde")
    disjoint(parts)
    with pytest.raises(IndexError, match="class 5; there are 5"):
        data.select([5])
    with pytest.raises(ValueError, match="'f', which are no classes here; there are 'a', 'b'"):
        data.named(["a", "f"])
    with pytest.raises(ValueError, match="'a' more than once"):
        data.named(["a", "a"])
    with pytest.raises(ValueError, match="seed=-1"):
        data.split(seed=-1)


def test_labels_of_the_wrong_length_or_kind():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="4 examples and 3 labels; one label each"):
        ClassSet.of(x, [0, 1, 0])
    with pytest.raises(
        ValueError, match=r"labels of shape \(4, 1\); one label for each example, shape \[M\], was needed$"
    ):
        ClassSet.of(x, torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(4, 3\).*write y\.argmax\(1\)"):
        ClassSet.of(x, torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"labels of type float; whole numbers or strings were needed: write y\.long"):
        ClassSet.of(x, torch.zeros(4))
    with pytest.raises(TypeError, match="labels of type int, str"):
        ClassSet.of(x, [1, "a", 1, "a"])
    for once in (iter([0, 1, 0, 1]), {0, 1, 2, 3}, {0: 1}, 3, None):
        with pytest.raises(TypeError, match="a sequence or tensor was needed"):
            ClassSet.of(x, once)
    with pytest.raises(ValueError, match="no examples"):
        ClassSet.of(torch.zeros(0, 2), [])
    with pytest.raises(ValueError, match="without a first dimension"):
        ClassSet.of(torch.tensor(1.0), [0])


def test_examples_of_the_wrong_kind():
    labels = [0, 1]
    with pytest.raises(TypeError, match="generator, which can be read only once"):
        ClassSet.of((torch.zeros(2) for _ in range(2)), labels)
    with pytest.raises(TypeError, match="could not make one tensor of x, a list"):
        ClassSet.of([torch.zeros(2), torch.zeros(3)], labels)
    with pytest.raises(TypeError, match="could not make one tensor of x, a ndarray"):
        ClassSet.of(numpy.array([object(), object()]), labels)
    with pytest.raises(TypeError, match="it has masked entries"):
        ClassSet.of(numpy.ma.masked_array([1.0, 2.0], mask=[0, 1]), labels)
    with pytest.raises(TypeError, match=r"layout torch\.sparse_coo; write x\.to_dense"):
        ClassSet.of(torch.eye(2).to_sparse(), labels)
    with pytest.raises(TypeError, match=r"ClassSet\.of_dataset\(dataset\)"):
        ClassSet.of(torch.utils.data.TensorDataset(torch.zeros(2)), labels)
    with pytest.raises(TypeError, match=r"examples of type list; a tensor was needed"):
        ClassSet([1, 2], (1, 1), ("a", "b"))
    with pytest.raises(ValueError, match="2 examples, 1 counts that sum to 3 and 1 names"):
        ClassSet(torch.zeros(2), (3,), ("a",))
    with pytest.raises(ValueError, match=r"counts=\(3, -1\).*none negative"):
        ClassSet(torch.zeros(2), (3, -1), ("a", "b"))


# --- from torch Datasets


class Pairs(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


DATASETS = {
    "tensors": torch.utils.data.TensorDataset(torch.arange(12.0).reshape(6, 2), torch.tensor([1, 0, 1, 0, 1, 0])),
    "pairs": Pairs([(numpy.arange(2.0) + 2 * i, (i + 1) % 2) for i in range(6)]),
    "lists of pairs": [(torch.arange(2.0) + 2 * i, torch.tensor((i + 1) % 2)) for i in range(6)],
    "numpy labels": Pairs([(torch.arange(2.0) + 2 * i, numpy.int64((i + 1) % 2)) for i in range(6)]),
}


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_datasets_come_by_class(dataset):
    for data in (ClassSet.of_dataset(dataset), DatasetClasses.of(dataset)):
        assert (data.names, data.counts) == (("0", "1"), (3, 3))
        assert data.take([0, 2, 3])[:, 0].tolist() == [2, 10, 0]
        assert data.take([0], torch.float16).dtype == torch.float16
        chosen = data.select([1])
        assert chosen.take([1])[0].tolist() == [4, 5]
        assert chosen.names == ("1",)
    subset = torch.utils.data.Subset(dataset, [5, 0])
    assert ClassSet.of_dataset(subset).take([0, 1])[:, 0].tolist() == [10, 0]


def test_labels_given_spare_a_pass():
    class Fails(Pairs):
        def __getitem__(self, row):
            raise AssertionError("read")

    data = DatasetClasses.of(Fails([0] * 4), labels=["a", "b", "a", "b"], names={"a": "A", "b": "B"})
    assert (data.names, data.counts) == (("A", "B"), (2, 2))
    with pytest.raises(ValueError, match="4 examples and 3 labels"):
        DatasetClasses.of(Fails([0] * 4), labels=[0, 1, 0])


def test_what_is_no_dataset_of_pairs():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(2), 0)])

    class Endless:
        def __getitem__(self, row):
            return torch.zeros(2), 0

    loader = torch.utils.data.DataLoader(DATASETS["tensors"])
    for of in (ClassSet.of_dataset, DatasetClasses.of):
        with pytest.raises(TypeError, match=r"a DataLoader, whose order may change; give its dataset, loader\.dataset"):
            of(loader)
        for once in (iter(DATASETS["tensors"]), Stream(), Endless(), zip([1], [2], strict=True), 3, None):
            with pytest.raises(TypeError, match="read only once or in one order; a map-style dataset"):
                of(once)
        for wrong in (torch.zeros(3, 2), {"a": 1}):
            with pytest.raises(TypeError, match=r"ClassSet\.of\(x, y\)"):
                of(wrong)
        with pytest.raises(ValueError, match="no examples"):
            of([])
        with pytest.raises(TypeError, match=r"item 0 of the dataset is a Tensor; a pair \(x, y\)"):
            of([torch.zeros(2)])
        with pytest.raises(TypeError, match=r"item 0 of the dataset is a tuple; a pair"):
            of([(1, 2, 3)])
        with pytest.raises(TypeError, match="labels of type float"):
            of([(torch.zeros(2), 0.5)])
    with pytest.raises(TypeError, match=r"x of type Image; a tensor or an array was needed.*ToTensor"):
        ClassSet.of_dataset([(Image.new("L", (4, 4)), 0)])
    with pytest.raises(ValueError, match=r"item 1 of the dataset has shape \(3,\), item 0 has \(2,\)"):
        ClassSet.of_dataset([(torch.zeros(2), 0), (torch.zeros(3), 0)])


# --- splits that share classes


def named(*names):
    return ClassSet(torch.zeros(len(names)), (1,) * len(names), names)


def test_disjoint_names_the_classes_that_overlap():
    disjoint(named("a", "b"), named("c"), named("d"))
    disjoint({"train": named("a"), "test": named("b")})
    disjoint(train=named("a"), test=named())
    with pytest.raises(ValueError, match=r"train and test share 2 classes: 'b', 'c'\. .*split by class"):
        disjoint(train=named("a", "b", "c"), test=named("c", "b", "d"))
    with pytest.raises(ValueError, match="split 1 and split 2 share 1 class: 'c'"):
        disjoint(named("a"), named("c"), named("c", "d"))
    with pytest.raises(ValueError, match="validation and test share 1 class: 'b'"):
        disjoint({"validation": named("b")}, test=named("b"))
    many = named(*(f"n{i:03d}" for i in range(100)))
    with pytest.raises(ValueError, match="'n007' and 92 more"):
        disjoint(many, many)
    with pytest.raises(ValueError, match="given 1 split; two or more"):
        disjoint(many)
    with pytest.raises(TypeError, match="split 1 of type list; sets of classes were needed"):
        disjoint(many, ["a"])


def test_a_rotated_copy_in_another_split_is_an_overlap():
    data = ImageSet(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), (1,) * 4, ("a", "b", "c", "d"))
    disjoint({name: part.rotated() for name, part in data.split((0.5, 0, 0.5)).items()})
    wrong = data.rotated().split((0.5, 0, 0.5), seed=0)
    with pytest.raises(ValueError, match="train and test share"):
        disjoint(wrong)


# --- folders


def picture(path, size=(10, 6), color=(10, 20, 30), mode="RGB", **saved):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **saved)


def test_image_folders(tmp_path):
    picture(tmp_path / "dog" / "1.PNG")
    picture(tmp_path / "dog" / "more" / "2.jpg", (5, 5), (200, 100, 50), quality=100)
    picture(tmp_path / "cat" / "1.bmp", (3, 3), (1, 2, 3))
    picture(tmp_path / "cat" / "2.gif", (8, 8), 255, "L")
    (tmp_path / "cat" / "readme.txt").write_text("no picture")
    (tmp_path / "cat" / "._1.png").write_bytes(b"resource fork")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "labels.csv").write_text("no folder")
    data = image_folder(tmp_path, side=4)
    assert (data.names, data.counts, data.images.shape) == (("cat", "dog"), (2, 2), (4, 3, 4, 4))
    assert data.images[0, :, 1, 2].tolist() == [1, 2, 3]
    assert data.images[2, :, 1, 2].tolist() == [10, 20, 30]
    assert (data.images[3, :, 1, 2] - torch.tensor([200, 100, 50])).abs().max() <= 3
    assert image_folder(tmp_path, side=4, mode="L").images.shape == (4, 1, 4, 4)
    batches = Episodes(data, tasks=2, way=2, shot=1, query=1)[0]
    assert batches.inner[0].shape == (2, 2, 3, 4, 4)


def test_image_folders_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere, which does not exist"):
        image_folder(tmp_path / "nowhere", side=4)
    with pytest.raises(FileNotFoundError, match=r"no classes in .*; folders of images, one for each class"):
        image_folder(tmp_path, side=4)
    picture(tmp_path / "1.png")
    with pytest.raises(FileNotFoundError, match="no classes in"):
        image_folder(tmp_path, side=4)
    picture(tmp_path / "dog" / "1.png")
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*cat; \*\.png, \*\.jpg"):
        image_folder(tmp_path, side=4)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match=r"no images in .*cat"):
        image_folder(tmp_path, side=4)
    (tmp_path / "cat" / "1.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"cat/1\.jpg could not be read as an image"):
        image_folder(tmp_path, side=4)
    whole = (tmp_path / "dog" / "1.png").read_bytes()
    (tmp_path / "cat" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cat/1\.jpg could not be read as an image"):
        image_folder(tmp_path, side=4)
    (tmp_path / "cat" / "1.jpg").unlink()
    Image.new("F", (4, 4), 0.5).save(tmp_path / "cat" / "1.tif")
    with pytest.raises(ValueError, match=r"cat/1\.tif could not be read as an image: its pixels are floating"):
        image_folder(tmp_path, side=4)
    with pytest.raises(ValueError, match="side=0"):
        image_folder(tmp_path, side=0)
    with pytest.raises(ValueError, match="mode='RGBA'; 'RGB' or 'L'"):
        image_folder(tmp_path, side=4, mode="RGBA")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "dog" / "1.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match=r"dog/1\.png could not be read as an image: .*Permission"):
        image_folder(tmp_path, side=4)


def test_omniglot_by_the_lists_of_vinyals(tmp_path):
    """Lines as in data/omniglot/splits/vinyals of the prototypical networks: alphabet/character/rot090."""
    for part, alphabet in (("images_background", "Greek"), ("images_evaluation", "Ulog")):
        for character in ("character01", "character02"):
            for drawer in range(2):
                image = Image.new("1", (105, 105), 1)
                image.paste(0, (0, 0, 30, 60))
                path = tmp_path / part / alphabet / character / f"{drawer}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    data = omniglot(tmp_path, "all")
    listing = tmp_path / "test.txt"
    listing.write_text("Ulog/character02/rot000\nUlog/character02/rot090\nGreek/character01/rot270\n")
    chosen = by_list(data, listing)
    assert chosen.names == ("Ulog/character02/rot000", "Ulog/character02/rot090", "Greek/character01/rot270")
    assert chosen.counts == (2, 2, 2)
    for group, quarter in enumerate((0, 1, 3)):
        assert torch.equal(chosen.images[2 * group], torch.rot90(data.images[0], quarter, (1, 2)))
    rotated = by_list(data.rotated(), listing)
    assert rotated.names == chosen.names
    assert torch.equal(rotated.images, chosen.images)
    # The file was rotated counterclockwise, as Pillow's rotate() and so the networks' loader do.
    turned = Image.fromarray(data.images[0, 0].numpy()).rotate(90)
    assert torch.equal(torch.tensor(numpy.asarray(turned)), chosen.images[2, 0])
    listing.write_text("Greek/character01\nUlog/character01\n")
    assert by_list(data, listing).names == ("Greek/character01", "Ulog/character01")
    for line in ("Latin/character01", "Greek/character01/rot045", "Greek/character01/rot360"):
        listing.write_text(line + "\n")
        with pytest.raises(ValueError, match=f"names '{line}', which is no class here"):
            by_list(data, listing)
    listing.write_text("Greek/character01\nGreek/character01\n")
    with pytest.raises(ValueError, match="Greek/character01 more than once"):
        by_list(data, listing)
    listing.write_text("\n")
    with pytest.raises(FileNotFoundError, match="no class names in"):
        by_list(data, listing)
    with pytest.raises(FileNotFoundError, match=r"by_list\(\) expected the list"):
        by_list(data, tmp_path / "nowhere.txt")


# --- FC100


def dumped(path, content, protocol=pickle.HIGHEST_PROTOCOL):
    path.write_bytes(pickle.dumps(content, protocol))


def pixels(count, side=32):
    return numpy.arange(count, dtype=numpy.uint8).reshape(-1, 1, 1, 1) * numpy.ones((1, side, side, 3), numpy.uint8)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("labels", [list, numpy.array, lambda x: [numpy.int64(each) for each in x]])
def test_fc100_pickles(tmp_path, protocol, labels):
    images = pixels(4)
    images[:, 3, 5, 1] = 99
    for short in ("train", "val", "test"):
        dumped(tmp_path / f"FC100_{short}.pickle", {"data": images, "labels": labels([70, 8, 70, 8])}, protocol)
    for split in ("train", "validation", "test"):
        data = fc100(tmp_path, split)
        assert (data.names, data.counts, data.images.shape) == (("8", "70"), (2, 2), (4, 3, 32, 32))
        assert data.images[:, 0, 0, 0].tolist() == [1, 3, 0, 2]
        assert data.images[0, :, 3, 5].tolist() == [1, 99, 1]


def test_fc100_pickles_of_python_2(tmp_path):
    """Protocol 2 as Python 2 writes it: names of modules of that time, texts as bytes."""
    images = numpy.full((1, 32, 32, 3), 200, numpy.uint8)
    body = images.tobytes()
    text = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01(K\x01K\x20K\x20K\x03tcnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T" + len(body).to_bytes(4, "little") + body + b"tbU\x06labels]K\x07au."
    )
    (tmp_path / "FC100_train.pickle").write_bytes(text)
    data = fc100(tmp_path)
    assert (data.names, data.counts) == (("7",), (1,))
    assert data.images.min() == data.images.max() == 200


def test_fc100_folders(tmp_path):
    for short in ("train", "val", "test"):
        for name in ("apple", "bear"):
            picture(tmp_path / short / name / "1.jpg", (32, 32))
    assert fc100(tmp_path, "validation").names == ("apple", "bear")


def test_fc100_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither .*FC100_val\.pickle nor the folder .*val; root must hold"):
        fc100(tmp_path, "validation")
    with pytest.raises(ValueError, match="split='val'; one of train, validation, test"):
        fc100(tmp_path, "val")
    file = tmp_path / "FC100_train.pickle"
    contents = {
        r"a dict with data and labels was expected": [{"data": pixels(2)}, {"images": 1}, [1, 2], pixels(2)],
        r"2 examples and 3 labels": [{"data": pixels(2), "labels": [1, 2, 3]}],
        r"data of dtype float64": [{"data": pixels(2) / 255, "labels": [1, 2]}],
        r"uint8 \[M, height, width, 3\] was expected": [
            {"data": pixels(2).transpose(0, 3, 1, 2), "labels": [1, 2]},
            {"data": pixels(2).reshape(2, -1), "labels": [1, 2]},
        ],
        r"images of 84 x 84 pixels; 32 x 32": [{"data": pixels(2, 84), "labels": [1, 2]}],
    }
    for message, given in contents.items():
        for content in given:
            dumped(file, content)
            with pytest.raises(ValueError, match=rf"FC100_train\.pickle.*{message}"):
                fc100(tmp_path)
    dumped(file, {"data": pixels(2), "labels": [1, 2]})
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\0" + whole, b"no pickle", whole[:-1]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"FC100_train\.pickle could not be read as a pickle"):
            fc100(tmp_path)


# --- pickles that are programs


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_a_pickle_that_is_a_program_is_refused_before_it_runs(tmp_path):
    trace = tmp_path / "trace"
    touch = Evil(os.system, f"touch {trace}")
    programs = [
        touch,
        Evil(eval, f"open({str(trace)!r}, 'w')"),
        Evil(open, str(trace), "w"),
        Evil(getattr, [], "append"),
        {"data": pixels(1), "labels": [touch]},
        {"data": numpy.array([touch], dtype=object), "labels": [1]},
        Evil(collections.Counter, [1]),
        Evil(numpy.load, "x.npy"),
        Evil(numpy.fromfile, "x"),
    ]
    for program in programs:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            dumped(tmp_path / "FC100_train.pickle", program, protocol)
            with pytest.raises(
                ValueError, match=r"FC100_train\.pickle asks for .*a pickle is a program.*load it yours"
            ):
                fc100(tmp_path)
    assert not trace.exists()


def test_other_ways_out_of_a_pickle(tmp_path):
    file = tmp_path / "FC100_train.pickle"

    class Outside(pickle.Pickler):
        def persistent_id(self, value):
            return "x" if value == "outside" else None

    buffer = io.BytesIO()
    Outside(buffer).dump(["outside"])
    codec = b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00abcX\x05\x00\x00\x00rot13\x86R."
    for content in (buffer.getvalue(), codec):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="only arrays and plain containers are read"):
            fc100(tmp_path)
    # A dotted name reaches into an allowed class.
    file.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")
    with pytest.raises(ValueError, match=r"asks for numpy\.ndarray\.tofile"):
        fc100(tmp_path)


# --- miniImageNet


@pytest.fixture
def mini(tmp_path):
    lists = {"train": ["n01", "n02", "n01"], "val": ["n03"], "test": ["n04"]}
    for short, labels in lists.items():
        lines = ["filename,label"]
        for number, label in enumerate(labels):
            name = f"{label}{short}{number:08d}.jpg"
            picture(tmp_path / "images" / name, (500, 375), (10 * number, 50, 200), quality=100)
            lines.append(f"{name},{label}")
        (tmp_path / f"{short}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_mini_imagenet_by_its_lists(mini):
    data = mini_imagenet(mini)
    assert (data.names, data.counts, data.images.shape) == (("n01", "n02"), (2, 1), (3, 3, 84, 84))
    assert (data.images[:, 0, 40, 40].float() - torch.tensor([0.0, 20.0, 10.0])).abs().max() <= 2
    assert mini_imagenet(mini, "validation").names == ("n03",)
    assert mini_imagenet(mini, "test", side=8).images.shape == (1, 3, 8, 8)
    disjoint(*(mini_imagenet(mini, split) for split in ("train", "validation", "test")))
    (mini / "test.csv").write_text("\n".join((mini / "test.csv").read_text().splitlines()[1:]))  # without a header
    assert mini_imagenet(mini, "test").names == ("n04",)


def test_mini_imagenet_lists_say_what_is_wrong(mini):
    listing = mini / "train.csv"
    first = listing.read_text().splitlines()[1]
    for text, error, message in (
        ("filename,label\n", FileNotFoundError, "no images in the list .*train.csv"),
        ("", FileNotFoundError, "no images in the list .*train.csv"),
        (f"{first}\n{first}\n", ValueError, "jpg more than once; it could be in support and query"),
        ("n09.jpg,n09\n", FileNotFoundError, "lists n09.jpg, which is not in .*images"),
        ("a,b,c\n", ValueError, "line 1 of .* is 'a,b,c'; filename,label was expected"),
        (f"{first}\nb,\n", ValueError, "line 2 of "),
    ):
        listing.write_text(text)
        with pytest.raises(error, match=message):
            mini_imagenet(mini)
    listing.write_text(first + "\n")
    (mini / "images" / first.split(",")[0]).write_text("no picture")
    with pytest.raises(ValueError, match="could not be read as an image"):
        mini_imagenet(mini)
    (mini / "images").rename(mini / "pictures")
    with pytest.raises(
        FileNotFoundError, match=r"images, which does not exist; root must hold images/ beside train\.csv"
    ):
        mini_imagenet(mini)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, lambda x: collections.defaultdict(list, x)])
def test_mini_imagenet_pickles(tmp_path, protocol, kind):
    content = {"image_data": pixels(6, 84), "class_dict": kind({"n02": [5, 0, 3], "n01": [1, 2, 4]})}
    for name in ("train", "val", "test"):
        dumped(tmp_path / f"mini-imagenet-cache-{name}.pkl", content, protocol)
    for split in ("train", "validation", "test"):
        data = mini_imagenet(tmp_path, split)
        assert (data.names, data.counts, data.images.shape) == (("n02", "n01"), (3, 3), (6, 3, 84, 84))
        assert data.images[:, 0, 0, 0].tolist() == [5, 0, 3, 1, 2, 4]
    (tmp_path / "mini-imagenet-cache-val.pkl").rename(tmp_path / "mini-imagenet-cache-validation.pkl")
    assert len(mini_imagenet(tmp_path, "validation")) == 2
    arrays = {"image_data": pixels(2, 84), "class_dict": {"n01": numpy.array([0]), "n02": range(1, 2)}}
    arrays["class_dict"]["n02"] = (1,)
    dumped(tmp_path / "mini-imagenet-cache-test.pkl", arrays, protocol)
    assert mini_imagenet(tmp_path, "test").counts == (1, 1)


def test_mini_imagenet_pickles_say_what_is_wrong(tmp_path):
    file = tmp_path / "mini-imagenet-cache-train.pkl"
    with pytest.raises(
        FileNotFoundError, match=r"neither .*train\.csv nor .*mini-imagenet-cache-train\.pkl; root must"
    ):
        mini_imagenet(tmp_path)
    images = pixels(3, 84)
    for classes, message in (
        ({"a": [0, 1], "b": [1]}, "not different numbers in 0 .. 2"),
        ({"a": [0, 3]}, "not different numbers in 0 .. 2"),
        ({"a": [-1]}, "not different numbers in 0 .. 2"),
        ({"a": [0], "b": []}, "no images of b"),
        ({}, "a dict of rows was expected"),
        ([0, 1], "a dict of rows was expected"),
    ):
        dumped(file, {"image_data": images, "class_dict": classes})
        with pytest.raises(ValueError, match=message):
            mini_imagenet(tmp_path)
    dumped(file, {"image_data": images, "class_dict": {"a": [0]}})
    with pytest.raises(ValueError, match=r"images of 84 x 84 pixels, and side=32 was asked for; pass side=84"):
        mini_imagenet(tmp_path, side=32)
    with pytest.raises(ValueError, match="split='dev'"):
        mini_imagenet(tmp_path, "dev")
    with pytest.raises(ValueError, match="side=0"):
        mini_imagenet(tmp_path, side=0)


def test_the_random_split_of_vinyals_has_its_sizes():
    parts = named(*map(str, range(1623))).split((1200 / 1623, 0, 423 / 1623), seed=0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 1200, "validation": 0, "test": 423}
    disjoint(parts)
