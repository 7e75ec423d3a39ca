"""Large images from a folder: the same batches whatever the workers, and a corrupt image by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from tcp_core import fit, nets
from tcp_core.streams import Stream


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(24):
        place = tmp_path / ("cat", "dog")[index % 2]
        place.mkdir(exist_ok=True)
        height, width = rng.integers(20, 60, size=2)
        pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index:02d}.png")
    return tmp_path


def stream(folder, **options):
    return Stream(folder, **{"size": 16, "batch_size": 5, "workers": 0, **options})


def test_batches_in_order_of_the_names(folder):
    val = stream(folder)
    assert repr(val) == "Stream(24 images in 2 classes, 5 batches)"
    assert val.classes == ("cat", "dog")
    batches = list(val)
    assert [len(y) for _, y in batches] == [5, 5, 5, 5, 4]
    assert torch.cat([y for _, y in batches]).tolist() == [0] * 12 + [1] * 12
    assert all(x.shape[1:] == (3, 16, 16) and x.dtype == torch.float32 for x, _ in batches)


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


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder with one folder of images a class"):
        Stream(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent must be a folder"):
        Stream(tmp_path / "absent")


def test_a_stream_trains_a_tailored_network(folder):
    torch.manual_seed(0)
    model = nets.small_resnet(num_classes=2, in_channels=3)
    result = fit(model, stream(folder, train=True), stream(folder), budget={"macs": 0.5}, epochs=24)
    assert 0.95 < result.report["utilisation"]["macs"] <= 1
