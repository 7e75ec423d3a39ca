"""Large images from a folder: the same batches whatever the workers, and a corrupt image by name."""

import os
import pickle
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from tcp_core import evaluate, fit, nets
from tcp_core.datasets import sources, streams
from tcp_core.datasets.images import Images
from tcp_core.datasets.streams import Stream


def save_images(folder, *, count=24, classes=("cat", "dog"), suffix=".png", sides=(20, 60)):
    """Images of random sizes, their numbers as names, class by class in turn."""
    rng = np.random.default_rng(0)
    for index in range(count):
        place = folder / classes[index % len(classes)]
        place.mkdir(exist_ok=True, parents=True)
        height, width = rng.integers(*sides, size=2)
        pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index:02d}{suffix}")
    return folder


@pytest.fixture
def folder(tmp_path):
    return save_images(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training folder of 40 JPEGs of 32 x 32, unequally many a class."""
    folder = tmp_path_factory.mktemp("whole")
    save_images(folder, count=30, classes=("ant", "bee", "cat"), suffix=".JPEG", sides=(32, 33))
    return save_images(folder, count=10, classes=("dog",), suffix=".JPEG", sides=(32, 33))


def stream(folder, **options):
    return Stream(folder, **{"size": 16, "batch_size": 5, "workers": 0, **options})


def test_batches_in_order_of_the_names(folder):
    (folder / ".hidden").mkdir()
    val = stream(folder)
    assert repr(val) == "Stream(24 images in 2 classes, 5 batches)"
    assert val.classes == ("cat", "dog")
    batches = list(val)
    assert [len(y) for _, y in batches] == [5, 5, 5, 5, 4]
    assert torch.cat([y for _, y in batches]).tolist() == [0] * 12 + [1] * 12
    assert val.shape == (3, 16, 16)
    assert all(x.shape[1:] == val.shape and x.dtype == torch.float32 for x, _ in batches)


def test_images_are_found_as_torchvision_finds_them_without_hidden_ones(folder):
    """In subfolders and behind links too, the files of a folder before those of the folders in it."""
    deeper = folder / "cat" / "a deeper one"
    deeper.mkdir()
    (folder / "cat" / "00.png").rename(deeper / "zz.PNG")
    elsewhere = folder.with_name("elsewhere")
    (folder / "dog").rename(elsewhere)
    (folder / "dog").symlink_to(elsewhere)
    expected = ImageFolder(str(folder))
    for place in (folder / "cat" / ".ipynb_checkpoints", folder / ".cat"):
        place.mkdir()
        (place / "00.png").write_bytes((folder / "cat" / "02.png").read_bytes())
    (folder / "dog" / "._01.png").touch()
    found = stream(str(folder))
    assert [(os.fsdecode(path), label) for path, label in zip(found.paths, found.labels, strict=True)] == expected.imgs


def test_seed_and_epoch_alone_decide_the_batches(folder):
    def drawn(epoch=0, **options):
        train = stream(folder, train=True, **options)
        train.set_epoch(epoch)
        state = torch.get_rng_state()
        batches = list(train)
        if not options.get("workers"):
            assert torch.get_rng_state().equal(state)
        return torch.cat([x for x, _ in batches])

    first = drawn()
    torch.manual_seed(5)
    assert first.equal(drawn())
    assert first.equal(drawn(workers=2))
    assert not first.equal(drawn(epoch=1))
    assert not first.equal(drawn(seed=1))
    assert not drawn(epoch=1).equal(drawn(seed=1))
    assert len(first) == 20  # what is left at the end is dropped


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_corrupt_image_is_named(folder, content):
    bad = folder / "cat" / "02.png"
    bad.write_bytes(bad.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=r"cat/02.png cannot be read .* skip_corrupt=True"):
        list(stream(folder))
    leaves_out = stream(folder, skip_corrupt=True)
    with pytest.warns(UserWarning, match=r"cat/02.png cannot be read .* left out, 1 so far"):
        batches = list(leaves_out)
    assert sum(len(y) for _, y in batches) == 23
    assert len(list(leaves_out)) == 5  # named once
    assert len(leaves_out.skipped) == 1


def bomb(path):
    """An image whose header says 30,000 x 30,000 pixels, which Pillow refuses with an error of a kind of its own."""
    content = bytearray(path.read_bytes())
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_decompression_bomb_is_left_out_or_an_error_with_its_name(folder, workers):
    bomb(folder / "cat" / "02.png")
    with pytest.raises(ValueError, match=r"cat/02.png cannot be read \(Image size \(900000000 pixels\) exceeds"):
        list(stream(folder, workers=workers))
    with pytest.warns(UserWarning, match=r"cat/02.png cannot be read .*900000000 pixels.* left out, 1 so far"):
        assert sum(len(y) for _, y in stream(folder, workers=workers, skip_corrupt=True)) == 23
    with pytest.raises(ValueError, match=r"cat/02.png .*900000000 pixels"):
        sources._decode(str(folder / "cat" / "02.png"), None)


def test_a_warning_of_pillow_for_a_bomb_that_is_an_error_is_one_image(folder, monkeypatch):
    """Between its limit and twice that Pillow warns; who makes warnings errors loses the image, not the run."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)
    faults = stream(folder, skip_corrupt=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        seen = sum(len(y) for _, y in faults)
    assert 0 < seen == 24 - len(faults.skipped) < 24
    assert len(found) == len(faults.skipped)


def test_a_line_of_pixels_is_not_scaled_to_gigabytes(folder):
    Image.new("RGB", (200_000, 1)).save(folder / "dog" / "01.png")
    resized = round(224 * 256 / 224) ** 2 * 200_000
    with pytest.warns(UserWarning, match=rf"01.png .*200000 x 1 pixels, which would be scaled to {resized:,}"):
        assert sum(len(y) for _, y in stream(folder, size=224, skip_corrupt=True)) == 23


def test_no_junk_stops_a_stream_that_leaves_out_what_is_corrupt(folder):
    random, kinds = np.random.default_rng(0), (".png", ".jpg", ".bmp", ".tiff", ".webp", ".ppm")
    image = Image.fromarray(random.integers(0, 256, size=(20, 20, 3), dtype=np.uint8))
    for number in range(150):
        path = folder / "cat" / f"junk{number:03d}{kinds[number % len(kinds)]}"
        image.save(path)
        content = bytearray(path.read_bytes())
        start = random.integers(min(len(content), 60))
        content[start : start + 4] = random.bytes(4)
        path.write_bytes(content[: random.integers(len(content))] if number % 4 == 0 else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        junk = stream(folder, skip_corrupt=True)
        seen, again = (sum(len(y) for _, y in junk) for _ in range(2))
    assert seen + len(junk.skipped) == len(junk.labels) == 24 + 150
    assert len(junk.skipped) > 50
    assert again == seen


def test_each_part_of_a_split_counts_what_it_leaves_out(folder):
    parts = stream(folder, train=True, skip_corrupt=True).split(4)
    strict = stream(folder, train=True).split(4)
    for part, count, same in zip(parts, (19, 3), strict, strict=True):
        Path(os.fsdecode(part.paths[0])).write_bytes(b"")
        with pytest.warns(UserWarning, match="left out, 1 so far"):
            assert sum(len(y) for _, y in part) == count
        assert len(list(part)) == len(part)  # named once
        assert len(part.skipped) == 1
        with pytest.raises(ValueError, match="cannot be read"):
            list(same)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder with one folder of images a class .* is empty"):
        Stream(tmp_path)
    (tmp_path / "file.png").touch()
    with pytest.raises(FileNotFoundError, match=r"must be a folder .* has files but no folders"):
        Stream(tmp_path)
    for place in ("absent", "file.png"):
        with pytest.raises(FileNotFoundError, match=f"{place} must be a folder"):
            Stream(tmp_path / place)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"batch_size": 0}, {"workers": -1}, {"size": 2.5}])
def test_numbers_out_of_range_are_refused(folder, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}; it must be an int of at least"):
        stream(folder, **wrong)


@given(val=st.integers(1, 39), seed=st.integers(0, 2**32))
def test_split_is_disjoint_complete_and_that_of_images(whole, val, seed):
    images = stream(whole, train=True)
    labels = torch.from_numpy(images.labels)
    numbered = Images(torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1), labels, images.classes, (0.0,), (1.0,))
    for part, same in zip(images.split(val, seed=seed), numbered.split(val, seed=seed), strict=True):
        assert part.paths.tolist() == images.paths[same.pixels.flatten().numpy()].tolist()
        assert part.labels.tolist() == same.labels.tolist()
        assert part.classes == images.classes
    train, held_out = images.split(val, seed=seed)
    assert sorted([*train.paths, *held_out.paths]) == sorted(images.paths)
    shares = np.bincount(images.labels) * val / 40
    assert (np.abs(np.bincount(held_out.labels, minlength=4) - shares) < 1).all()


def test_a_split_validates_with_the_centre_and_trains_with_crops(whole):
    train, val = stream(whole, train=True, batch_size=8).split(0.25)
    assert (len(train), len(val), len(train.labels), len(val.labels)) == (3, 2, 30, 10)
    centres = torch.cat([x for x, _ in stream(whole)])
    chosen = np.isin(stream(whole).paths, val.paths)
    assert torch.cat([x for x, _ in val]).equal(centres[torch.from_numpy(chosen)])
    first = torch.cat([x for x, _ in train])
    assert first.equal(torch.cat([x for x, _ in train]))
    train.set_epoch(1)
    assert not first.equal(torch.cat([x for x, _ in train]))
    assert torch.cat([x for x, _ in val]).equal(centres[torch.from_numpy(chosen)])


@pytest.mark.parametrize("val", [0, 40, 1.0])
def test_a_split_with_an_empty_part_is_refused(whole, val):
    with pytest.raises(ValueError, match=rf"val={val} leaves .* of 40 images .* from 1 to 39"):
        stream(whole).split(val)


@pytest.mark.parametrize("held_out", [("val",), ("test",), ("val", "test")])
def test_load_gives_the_parts_of_an_image_folder(tmp_path, monkeypatch, held_out):
    for part, count in zip(("train", *held_out), (20, 6, 4), strict=False):
        save_images(tmp_path / part, count=count)
    scanned, of_folder = [], streams.class_files

    def class_files(folder, classes):
        scanned.append(folder)
        return of_folder(folder, classes)

    monkeypatch.setattr(streams, "class_files", class_files)
    options = {"size": 16, "batch_size": 4, "workers": 0, "seed": 3, "skip_corrupt": True}
    splits = streams.load(str(tmp_path), **options, val_images=2)
    assert isinstance(splits, sources.Splits)
    assert scanned == [str(tmp_path / part) for part in ("train", *held_out)]  # each once
    assert [len(part.labels) for part in splits] == ([20, 6, 4] if len(held_out) == 2 else [18, 2, 6])
    assert [part.train for part in splits] == [True, False, False]
    for part in splits:
        assert part.classes == ("cat", "dog")
        assert (part.size, part.batch_size, part.workers, part.seed, part.skip_corrupt) == tuple(options.values())


def test_load_refuses_wrong_folders_before_it_lists_files(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "Stream", None)
    with pytest.raises(FileNotFoundError, match="there is no folder .*absent; pass the path of an image folder"):
        streams.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="has none of the folders train, val, test; it needs train"):
        streams.load(tmp_path)
    save_images(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"has train of the folders .* at least one of val, test"):
        streams.load(tmp_path)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "0.JPEG").touch()  # as ImageNet's are unpacked
    with pytest.raises(FileNotFoundError, match="val has files but no folders; it must hold one folder of images"):
        streams.load(tmp_path)
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match="must have the same classes, but only one of them has dog"):
        streams.load(tmp_path)


def test_processes_share_every_batch(whole):
    """Each of three takes 4 images of what one process would take as a batch of 12; all validate with all."""
    one = list(stream(whole, train=True, batch_size=12))
    train, val = stream(whole, train=True, batch_size=4), stream(whole)
    images = torch.cat([x for x, _ in val])
    assert len(train) == 10
    parts = []
    for rank in range(3):
        ours = pickle.loads(pickle.dumps(train)).among(rank, 3)  # as a process that is spawned gets it
        assert len(ours) == 3
        parts.append(list(ours))
        assert len(val) == 8
        assert torch.cat([x for x, _ in val]).equal(images)
    for batch, *own in zip(one, *parts, strict=True):
        for together, separate in zip(batch, zip(*own, strict=True), strict=True):
            assert together.equal(torch.cat(separate))


def test_a_stream_for_training_is_measured_on_the_centre_of_every_image(folder):
    torch.manual_seed(0)
    model = nets.small_resnet(num_classes=2, in_channels=3)
    train = stream(folder, train=True, seed=3)
    found = evaluate(model, train)
    assert found == evaluate(model, stream(folder))
    assert train.train
    history = fit(model, train, stream(folder, train=True), epochs=1, lr=1e-9).history
    assert history["val_loss"][0] == pytest.approx(evaluate(model, stream(folder))["loss"], rel=1e-4)


@pytest.mark.medium
def test_a_stream_trains_a_tailored_network(folder):
    torch.manual_seed(0)
    model = nets.small_resnet(num_classes=2, in_channels=3)
    result = fit(model, stream(folder, train=True), stream(folder), budget={"macs": 0.5}, epochs=24)
    assert 0.95 < result.report["utilisation"]["macs"] <= 1
