import os
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tcp_core.datasets import sources, streams
from tcp_core.datasets.images import Images, crop_and_flip


def some_images(count=23, channels=3, height=6, width=5, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Images(
        torch.randint(0, 256, (count, channels, height, width), generator=generator).byte(),
        torch.randint(0, classes, (count,), generator=generator),
        tuple(f"class {index}" for index in range(classes)),
        mean=tuple(0.1 * (index + 3) for index in range(channels)),
        std=tuple(0.1 * (index + 2) for index in range(channels)),
    )


def save_images(folder, *, classes=("cat", "dog"), count=3, size=(8, 8), seed=0):
    """PNG files, which lose nothing, and the arrays in them in order of their names."""
    rng = np.random.default_rng(seed)
    arrays = rng.integers(0, 256, size=(len(classes), count, *size, 3), dtype=np.uint8)
    for name, members in zip(classes, arrays, strict=True):
        (folder / name).mkdir(parents=True)
        for index, array in enumerate(members):
            Image.fromarray(array).save(folder / name / f"{index}.png")
    return arrays


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    save_images(root / "train", seed=1)
    save_images(root / "test", seed=2)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TCP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Images


def test_images_know_their_length_and_show_their_shape():
    images = some_images()
    assert len(images) == 23
    assert images.shape == (3, 6, 5)
    assert repr(images) == "Images(23 x 3 x 6 x 5, 3 classes, cpu)"


def test_images_move_to_another_device():
    moved = some_images().to("meta")
    assert moved.pixels.device.type == moved.labels.device.type == "meta"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pixels", torch.zeros(23, 3, 6, 5), r"torch\.float32 .*must be torch\.uint8 of shape"),
        ("pixels", torch.zeros(23, 6, 5).byte(), r"\(23, 6, 5\); they must be torch\.uint8"),
        ("labels", torch.zeros(22).long(), r"must be torch\.int64 of shape \[23\]"),
        ("labels", torch.zeros(23), r"torch\.float32 .*must be torch\.int64"),
        ("mean", (0.5,), "each must hold 3 numbers"),
        ("std", (0.5, 0.5, 0.0), "std only positive ones"),
    ],
)
def test_malformed_images_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(some_images(), **{field: value})


# Splitting


@given(st.integers(2, 60), st.integers(1, 5), st.integers(0, 9), st.data())
def test_split_is_disjoint_complete_and_stratified(count, classes, seed, draw):
    number = draw.draw(st.integers(1, count - 1))
    images = some_images(count, classes=classes, seed=seed)
    # the first pixel names the image
    images.pixels[:, 0, 0, 0] = torch.arange(count).byte()
    parts = images.split(number, seed=seed)
    assert [len(part) for part in parts] == [count - number, number]
    names = [part.pixels[:, 0, 0, 0].tolist() for part in parts]
    assert sorted(names[0] + names[1]) == list(range(count))
    for part, members in zip(parts, names, strict=True):
        assert torch.equal(part.labels, images.labels[members])
    exact = images.labels.bincount(minlength=classes) * (number / count)
    assert ((parts[1].labels.bincount(minlength=classes) - exact).abs() < 1).all()


def test_split_depends_on_the_seed_alone():
    images = some_images(200)
    first, again, other = (images.split(0.25, seed=seed)[1] for seed in (1, 1, 2))
    assert len(first) == 50
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, other.pixels)


@pytest.mark.parametrize("val", [0, 23, -1, 0.0, 1.0, 0.01, 1.5])
def test_split_with_an_empty_part_is_refused(val):
    with pytest.raises(ValueError, match=rf"val={val} .*number \(int\) from 1 to 22"):
        some_images().split(val)


# Batches


def crop_one(pixels, top, left, flip, padding):
    """One image, by PIL-like steps: paste on black, cut out, mirror."""
    channels, height, width = pixels.shape
    canvas = np.zeros((channels, height + 2 * padding, width + 2 * padding), dtype=np.uint8)
    canvas[:, padding : padding + height, padding : padding + width] = pixels
    cut = canvas[:, top : top + height, left : left + width]
    return cut[:, :, ::-1] if flip else cut


@pytest.mark.medium
@given(st.data(), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 3))
def test_crop_and_flip_equals_one_image_at_a_time(draw, channels, height, width, padding):
    images = some_images(5, channels, height, width)
    shift = st.integers(0, 2 * padding)
    shifts = draw.draw(st.lists(st.tuples(shift, shift), min_size=5, max_size=5))
    flips = draw.draw(st.lists(st.booleans(), min_size=5, max_size=5))
    result = crop_and_flip(images.pixels, torch.tensor(shifts), torch.tensor(flips), padding=padding)
    for index, ((top, left), flip) in enumerate(zip(shifts, flips, strict=True)):
        expected = crop_one(images.pixels[index].numpy(), top, left, flip, padding)
        assert np.array_equal(result[index].numpy(), expected)


def test_plain_batches_are_the_images_in_order_normalised_as_torchvision_does():
    images = some_images()
    batches = images.batches(10)
    xs, ys = zip(*batches, strict=True)
    assert [len(x) for x in xs] == [10, 10, 3]
    assert len(batches) == 3
    to_tensor, normalize = (
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(images.mean, images.std),
    )
    expected = [normalize(to_tensor(pixels.permute(1, 2, 0).numpy())) for pixels in images.pixels]
    torch.testing.assert_close(torch.cat(xs), torch.stack(expected))
    assert torch.equal(torch.cat(ys), images.labels)


@pytest.mark.parametrize(("count", "expected"), [(20, 2), (23, 2), (9, 0)])
def test_drop_last_leaves_out_the_incomplete_batch(count, expected):
    batches = some_images(count).batches(10, drop_last=True)
    assert len(batches) == expected == sum(len(x) == 10 for x, _ in batches)


def everything(images, batch_size=8, **options):
    xs, ys = zip(*images.batches(batch_size, **options), strict=True)
    return torch.cat(xs), torch.cat(ys)


def test_seed_and_epoch_fix_a_pass_whatever_the_batch_size_and_global_generators():
    images = some_images()
    options = {"shuffle": True, "augment": "crop_flip", "seed": 3, "epoch": 5}
    x, y = everything(images, **options)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  the generator that must not matter
    random.seed(99)
    again, labels = everything(images, batch_size=5, **options)
    assert torch.equal(x, again)
    assert torch.equal(y, labels)
    for other in ({"seed": 4}, {"epoch": 6}):
        assert not torch.equal(x, everything(images, **options | other)[0])


def test_batches_leave_global_generators_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    everything(some_images(), shuffle=True, augment="crop_flip")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002


def test_the_same_batches_can_be_iterated_over_twice():
    batches = some_images().batches(8, shuffle=True, augment="crop")
    for (x, _), (again, _) in zip(batches, batches, strict=True):
        assert torch.equal(x, again)


def test_shuffling_takes_every_image_once():
    images = some_images(100, classes=100)
    images = replace(images, labels=torch.arange(100))
    _, y = everything(images, shuffle=True)
    assert y.sort().values.tolist() == list(range(100))
    assert y.tolist() != list(range(100))


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmented_images_take_all_places_equally_often(augment):
    # One bright pixel amid dark ones; where it goes tells the shift and the flip.
    pixels = torch.zeros(20_000, 1, 9, 9, dtype=torch.uint8)
    pixels[:, :, 4, 3] = 255
    images = Images(pixels, torch.zeros(20_000).long(), ("one",), (0.0,), (1.0,))
    x, _ = everything(images, batch_size=5_000, augment=augment, padding=1)
    seen = x.sum(0)[0].round()
    columns = [2, 3, 4] if augment == "crop" else [2, 3, 4, 4, 5, 6]
    expected = torch.zeros(9, 9)
    for column in columns:
        expected[3:6, column] += 20_000 / (3 * len(columns))
    assert seen.sum() == 20_000
    # six standard deviations of a count
    assert ((seen - expected).abs() <= 6 * expected.sqrt()).all()


@pytest.mark.parametrize(("size", "padding"), [((32, 32), 4), ((64, 48), 6), ((8, 8), 1)])
def test_padding_is_an_eighth_of_the_shorter_side(size, padding):
    images = some_images(2, 3, *size)
    assert images.batches(2, augment="crop").padding == padding


def test_batches_go_to_the_device_asked_for():
    x, y = next(iter(some_images().batches(4, augment="crop_flip", device="meta")))
    assert x.device.type == y.device.type == "meta"
    assert (x.shape, x.dtype, y.dtype) == ((4, 3, 6, 5), torch.float32, torch.int64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_equal_those_on_the_cpu():
    images = some_images()
    options = {"shuffle": True, "augment": "crop_flip"}
    x, y = everything(images.to("cuda"), **options)
    assert x.device.type == "cuda"
    expected, labels = everything(images, **options)
    torch.testing.assert_close(x.cpu(), expected)
    assert torch.equal(y.cpu(), labels)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"augment": "flip"}, "augment='flip'; it must be one of none, crop, crop_flip"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "the others at least 0"),
        ({"epoch": -1}, "the others at least 0"),
        ({"padding": -1}, "the others at least 0"),
    ],
)
def test_impossible_batches_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        some_images().batches(**{"batch_size": 8, **wrong})


# Digits and CIFAR-10


def test_digits_are_all_there_once_and_stratified():
    parts = sources.load("digits")
    assert [len(part) for part in parts] == [1257, 180, 360]
    assert all(part.pixels.shape[1:] == (1, 8, 8) for part in parts)
    from sklearn.datasets import load_digits

    expected = load_digits().images.reshape(-1, 64)
    found = torch.cat([part.pixels for part in parts]).flatten(1).numpy()
    assert sorted(map(tuple, found)) == sorted(map(tuple, (expected * 255 / 16).round()))
    for part in parts:
        shares = part.labels.bincount(minlength=10) / len(part)
        assert ((shares - 0.1).abs() < 0.01).all()


def test_training_statistics_normalise_the_training_images_and_serve_all_parts():
    train, val, test = sources.digits()
    x, _ = everything(train)
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
    assert train.mean == val.mean == test.mean
    assert train.std == val.std == test.std


def test_statistics_can_be_given(folder):
    train, _, test = sources.load(folder, **sources.IMAGENET_STATISTICS)
    assert train.mean == test.mean == (0.485, 0.456, 0.406)
    assert train.std == test.std == (0.229, 0.224, 0.225)


def test_images_of_one_colour_are_not_divided_by_zero(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "gray").mkdir(parents=True)
        Image.new("RGB", (4, 4), (0, 0, 0)).save(tmp_path / part / "gray" / "0.png")
    assert sources.image_folder(tmp_path).train.std == (1.0, 1.0, 1.0)


def test_cifar10_comes_in_torchvisions_format(monkeypatch, tmp_path):
    class Stub:
        def __init__(self, root, *, train, download):
            assert (root, download) in ((str(tmp_path), True), (str(tmp_path), False))
            rng = np.random.default_rng(train)
            self.data = rng.integers(0, 256, size=(6, 32, 32, 3), dtype=np.uint8)
            self.targets = [3, 1, 4, 1, 5, 9]
            self.classes = [str(index) for index in range(10)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stub)
    train, val, test = sources.load("cifar10", root=tmp_path, download=True)
    assert val is None
    assert train.classes == tuple("0123456789")
    for images, seed in ((train, True), (test, False)):
        expected = Stub(str(tmp_path), train=seed, download=True).data
        assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), expected)
        assert images.labels.tolist() == [3, 1, 4, 1, 5, 9]

    (tmp_path / "cifar-10-batches-py").mkdir()
    assert sources.load(str(tmp_path)).test.pixels.equal(test.pixels)  # the folder says what it is


def test_absent_cifar10_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*pass download=True"):
        sources.load("cifar10", root=tmp_path)


def test_cifar10_without_root_is_refused():
    with pytest.raises(ValueError, match="cifar10 needs root"):
        sources.load("cifar10")


# Image folders


def test_folder_gives_its_images_in_order_of_class_and_name(folder):
    train, val, test = sources.load(str(folder))
    assert val is None
    assert train.classes == test.classes == ("cat", "dog")
    for images, seed in ((train, 1), (test, 2)):
        arrays = save_images(folder.parent / f"again{seed}", seed=seed)
        expected = arrays.reshape(-1, 8, 8, 3).transpose(0, 3, 1, 2)
        assert np.array_equal(images.pixels.numpy(), expected)
        assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_folder_may_have_val_and_test(folder):
    save_images(folder / "val", count=1)
    parts = sources.load(folder)
    assert [len(part) for part in parts] == [6, 2, 6]


def test_folder_finds_images_in_subfolders_and_passes_over_other_files(folder):
    deeper = folder / "train" / "cat" / "more"
    deeper.mkdir()
    os.rename(folder / "train" / "cat" / "0.png", deeper / "a.PNG")
    (folder / "train" / "cat" / "boxes.txt").write_text("not an image")
    for place in (folder / "train" / ".hidden", folder / "train" / "cat" / ".ipynb_checkpoints"):
        place.mkdir()
        shutil.copy(folder / "train" / "dog" / "0.png", place / "0-checkpoint.png")
    (folder / "train" / "dog" / "._0.png").write_bytes(b"what macOS keeps of a file")
    train = sources.load(folder).train
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_gray_and_palette_images_become_rgb(folder):
    path = folder / "train" / "cat" / "0.png"
    gray = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    gray.save(path)
    gray.convert("P").save(folder / "train" / "cat" / "1.png")
    pixels = sources.load(folder).train.pixels[:2]
    assert torch.equal(pixels, torch.arange(64).byte().view(1, 1, 8, 8).expand(2, 3, 8, 8))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_gray_in_sixteen_bits_keeps_the_upper_eight(folder, suffix):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    (folder / "train" / "cat" / "0.png").unlink()
    Image.fromarray(ramp).save(folder / "train" / "cat" / f"0.{suffix}")
    expected = torch.from_numpy((ramp // 256).astype(np.uint8)).expand(3, 8, 8)
    assert torch.equal(sources.load(folder).train.pixels[0], expected)
    stream = streams.Stream(folder / "train", size=7, batch_size=1, workers=0, mean=(0,) * 3, std=(1,) * 3)
    x, _ = next(iter(stream))
    assert torch.equal((x[0] * 255).round().byte(), expected[:, :7, :7])


@pytest.mark.parametrize(("kind", "name"), [(np.int32, "integers"), (np.float32, "floats")])
def test_gray_in_32_bits_is_refused(folder, kind, name):
    Image.fromarray(np.full((8, 8), 300, dtype=kind)).save(folder / "train" / "cat" / "0.tif")
    with pytest.raises(ValueError, match=rf"cat/0\.tif cannot be read .*gray of 32-bit {name}; convert it to eight"):
        sources.load(folder)
    with pytest.raises(ValueError, match=rf"cat/0\.tif cannot be read \(gray of 32-bit {name}"):
        list(streams.Stream(folder / "train", size=8, workers=0))


@pytest.mark.parametrize(("size", "expected"), [(4, (4, 4)), ((6, 4), (6, 4))])
def test_size_resizes_and_crops_at_the_centre(folder, size, expected):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200  # covers a centred square, and more than a 6 x 4 crop
    Image.fromarray(wide).save(folder / "train" / "cat" / "0.png")
    train = sources.load(folder, size=size).train
    assert train.pixels.shape[2:] == expected
    assert (train.pixels[0, :, :, 1:-1].float() - 200).abs().max() < 25


def test_second_start_reads_the_cache_alone(folder, cache, monkeypatch):
    first = sources.load(folder)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(sources, "_decode", None)
    second = sources.load(folder)
    for before, after in zip(first, second, strict=True):
        assert (before is None) == (after is None)
        if before is not None:
            assert torch.equal(before.pixels, after.pixels)
            assert torch.equal(before.labels, after.labels)
            assert (before.classes, before.mean, before.std) == (
                after.classes,
                after.mean,
                after.std,
            )


def test_cache_folder_can_be_given(folder, cache, tmp_path):
    sources.load(folder, cache=tmp_path / "elsewhere" / "deep")
    assert len(list((tmp_path / "elsewhere" / "deep").iterdir())) == 2
    assert not cache.exists()


@pytest.mark.parametrize("change", ["content", "added", "renamed"])
def test_changed_files_are_decoded_again(folder, cache, change):
    before = sources.load(folder).train
    path = folder / "train" / "cat" / "1.png"
    if change == "content":
        Image.new("RGB", (8, 8)).save(path)
    elif change == "added":
        Image.new("RGB", (8, 8)).save(path.with_name("9.png"))
    else:
        path.rename(folder / "train" / "dog" / "9.png")
    after = sources.load(folder).train
    assert not (torch.equal(before.pixels, after.pixels) and torch.equal(before.labels, after.labels))
    # the old file is replaced, not kept beside the new one
    assert len(list(cache.iterdir())) == 2


def test_sizes_are_cached_apart(folder):
    assert sources.load(folder).train.pixels.shape[2:] == (8, 8)
    assert sources.load(folder, size=4).train.pixels.shape[2:] == (4, 4)
    assert sources.load(folder).train.pixels.shape[2:] == (8, 8)


@pytest.mark.parametrize("content", [b"", b"not a cache file", None])
def test_broken_cache_file_is_reported_and_made_again(folder, cache, content):
    before = sources.load(folder).train
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.warns(UserWarning, match=r"cache file .* is unreadable and is made again"):
        after = sources.load(folder).train
    assert torch.equal(before.pixels, after.pixels)
    sources.load(folder)  # warns no more


def test_no_cache_file_in_which_a_bit_has_changed_is_used(folder, cache):
    before, rng = sources.load(folder).train, np.random.default_rng(0)
    (path,) = cache.glob("images-train-*")
    whole = path.read_bytes()
    for _ in range(40):
        content = bytearray(whole)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="cache file .*images-train.* is unreadable and is made again"):
            after = sources.load(folder).train
        assert torch.equal(before.pixels, after.pixels)
        assert torch.equal(before.labels, after.labels)
    assert path.read_bytes() == whole


def test_cache_files_of_the_version_before_are_made_again_without_a_word(folder, cache):
    sources.load(folder)
    for path in cache.iterdir():
        torch.save({"fingerprint": "", "pixels": torch.zeros(0), "labels": torch.zeros(0)}, path)
    assert len(sources.load(folder).train) == 6
    assert all(path.read_bytes().startswith(b"tcp_core images") for path in cache.iterdir())


def test_a_place_may_begin_with_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(sources.load("~/images", cache="~/kept").train) == 6
    assert len(list((folder.parent / "kept").iterdir())) == 2
    (folder.parent / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=rf"CIFAR-10 is not in {folder.parent}/cifar, or not whole"):
        sources.load("~/cifar")


def test_cache_that_cannot_be_written_is_reported(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"could not keep the decoded images .*TCP_CACHE"):
        sources.load(folder, cache=tmp_path / "file" / "cache")


def test_missing_folder_is_refused_with_the_known_names(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder .*cifra10; .* "digits", "cifar10"'):
        sources.load(tmp_path / "cifra10")


@pytest.mark.parametrize(("parts", "found"), [((), "none"), (("train",), "train"), (("val", "test"), "val, test")])
def test_folder_without_the_parts_is_refused(tmp_path, parts, found):
    for part in parts:
        save_images(tmp_path / part)
    with pytest.raises(FileNotFoundError, match=f"has {found} of the folders .*it needs train"):
        sources.load(tmp_path)


def test_empty_part_is_refused(folder):
    (folder / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"val is empty; it must hold one folder"):
        sources.load(folder)


def test_empty_class_is_refused(folder):
    for part in ("train", "test"):
        (folder / part / "cow").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image in .*cow; every class needs"):
        sources.load(folder)


def test_differing_classes_are_refused(folder):
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    with pytest.raises(ValueError, match=r"train and .*test must have .* dog, wolf"):
        sources.load(folder)


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_unreadable_image_is_refused_by_its_path(folder, cache, content):
    path = folder / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:100] if content is None else content)
    with pytest.raises(ValueError, match=r"dog/1\.png cannot be read as an image"):
        sources.load(folder)
    assert not cache.exists()


def test_images_of_several_sizes_are_refused_without_size(folder):
    Image.new("RGB", (9, 7)).save(folder / "train" / "dog" / "2.png")
    with pytest.raises(ValueError, match=r"dog/2\.png has height x width 7 x 9, .* pass size"):
        sources.load(folder)
    assert sources.load(folder, size=8).train.pixels.shape == (6, 3, 8, 8)


def test_parts_of_several_sizes_are_refused_without_size(folder):
    save_images(folder / "val", size=(8, 9))
    with pytest.raises(ValueError, match=r"differ in height and width: .*\(8, 9\).* pass size"):
        sources.load(folder)


def test_data_that_are_not_resized_take_no_size(tmp_path):
    with pytest.raises(ValueError, match="size=16 given, .* digits has one size, so leave it out"):
        sources.load("digits", size=16)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match="size=16 given, .* cifar10 has one size, so leave it out"):
        sources.load(tmp_path, size=16)
