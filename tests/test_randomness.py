"""Random numbers of every kind go on where a stopped run left them: the resumed run is the one that was not stopped."""

import random
import warnings

import numpy as np
import pytest
import torch
from cases import slow
from test_checkpoints import EPOCHS, Stop, images, network, same
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler

from tcp_core import fit
from tcp_core.training import checkpoints
from tcp_core.training.randomness import generators, random_state, set_random_state

__all__ = ["images"]  # the fixture

CPU = torch.device("cpu")
KINDS = ("python", "numpy", "torch", "own numpy", "own python", "closure")


class Augmented(Dataset):
    """Images moved and made noisy by random numbers of one kind, or of all."""

    def __init__(self, images, kind):
        self.images, self.kind = images, kind
        # made only where they are drawn from, as every generator that is found is kept
        self.own = np.random.default_rng(7) if kind in ("own numpy", "all") else None
        self.other = random.Random(7) if kind in ("own python", "all") else None
        self.transform = noisy(torch.Generator().manual_seed(5)) if kind in ("closure", "all") else lambda x: x

    def __len__(self):
        return len(self.images)

    def draw(self, kind):
        match kind:
            case "python":
                return random.gauss(0, 0.1)
            case "numpy":
                return np.random.normal(0, 0.1)  # noqa: NPY002
            case "torch":
                return float(torch.randn(())) / 10
            case "own numpy":
                return self.own.normal(0, 0.1)
            case "own python":
                return self.other.gauss(0, 0.1)
            case "all":
                return sum(map(self.draw, KINDS))
        return 0.0

    def __getitem__(self, index):
        x = self.images.pixels[index].float() / 255 + self.draw(self.kind)
        return self.transform(x), int(self.images.labels[index])


def noisy(generator):
    return lambda x: x + 0.1 * torch.randn(x.shape, generator=generator)


def loader(train, kind, **options):
    return DataLoader(Augmented(train, kind), batch_size=20, **{"shuffle": True} | options)


def seeded(kind, make, val, folder=None, stop=None, every=7):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)

    def stopped(step, steps):
        if step == stop:
            raise Stop

    options = {"checkpoints": folder, "checkpoint_every": every, "on_step": stopped, "lr": 0.05}
    return fit(network(), make(kind), val, budget={"macs": 0.5}, epochs=EPOCHS, **options)


def check(images, tmp_path, kind, make, stops=(10, 40), every=7):
    """Whole, and stopped where an epoch begins, in one and at its end (16 steps)."""
    whole = seeded(kind, make, images[1])
    for stop in stops:
        with pytest.raises(Stop):
            seeded(kind, make, images[1], tmp_path, stop, every)
    same(whole, seeded(kind, make, images[1], tmp_path, every=every))


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["all", *slow(*KINDS)])
def test_augmentation_goes_on(images, tmp_path, kind):
    check(images, tmp_path, kind, lambda kind: loader(images[0], kind))


@pytest.mark.medium
@pytest.mark.parametrize("every", [5, *slow(16)])
def test_a_loader_s_own_generator_goes_on(images, tmp_path, every):
    make = lambda kind: loader(images[0], kind, generator=torch.Generator().manual_seed(11))  # noqa: E731
    check(images, tmp_path, "python", make, stops=(12, 33), every=every)


@pytest.mark.medium
def test_a_sampler_s_own_generator_goes_on(images, tmp_path):
    def make(kind):
        sampler = RandomSampler(range(320), replacement=True, generator=torch.Generator().manual_seed(2))
        return loader(images[0], kind, shuffle=False, sampler=sampler)

    check(images, tmp_path, "none", make, stops=(40,))


@pytest.mark.medium
def test_workers_draw_the_same_again(images, tmp_path):
    """They are started anew each epoch, seeded by the loader's generator, which goes on."""
    make = lambda kind: loader(images[0], kind, num_workers=1, generator=torch.Generator().manual_seed(2))  # noqa: E731
    check(images, tmp_path, "numpy", make, stops=(40,))


@pytest.mark.medium
def test_workers_that_outlive_an_epoch_are_warned_of(images, tmp_path):
    make = lambda kind: loader(images[0], kind, num_workers=1, persistent_workers=True)  # noqa: E731
    with pytest.raises(Stop):
        seeded("numpy", make, images[1], tmp_path, 20)
    with pytest.warns(UserWarning, match="train has persistent_workers=True: .* Leave the option out"):
        seeded("numpy", make, images[1], tmp_path)


def test_generators_are_found_where_they_are_kept(images):
    own, other = torch.Generator(), np.random.RandomState(0)
    sampler = WeightedRandomSampler(torch.ones(320).tolist(), 320, generator=own)
    data = Augmented(images[0], "own numpy")
    data.more = {"deep": [(other,)]}
    model = network()
    model.layer1.noise = torch.Generator()
    found = generators(
        train=DataLoader(data, 20, sampler=sampler), network=model, val=[(torch.ones(1), 0)] * 50, none=None
    )
    assert found == {
        "train.sampler.generator": own,
        "train.dataset.own": data.own,
        "train.dataset.more.deep.0.0": other,
        "network.layer1.noise": model.layer1.noise,
    }
    assert not generators(train=images[0], val=images[1], network=network())
    assert not generators(module=random, other=np.random, large=[torch.Generator()] * 101)


def test_every_kind_of_generator_comes_back_as_it_was(tmp_path):
    """By way of a file, which holds plain values alone."""
    given = {
        "torch": torch.Generator().manual_seed(3), "python": random.Random(1),
        "old": np.random.RandomState(1),
        **{kind.__name__: np.random.Generator(kind(1)) for kind in
           (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64)},
    }  # fmt: skip
    given = {name: [generator] for name, generator in given.items()}

    def drawn():
        return (
            random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(()).item(),  # noqa: NPY002
            torch.rand((), generator=given["torch"][0]).item(), given["python"][0].gauss(0, 1),
            *(generator[0].normal() for name, generator in given.items() if name not in ("torch", "python")),
        )  # fmt: skip

    drawn()  # a second number of each pair is waiting in some
    checkpoints.write(tmp_path, 1, {"random": random_state(CPU, **given)})
    first = drawn()
    assert drawn() != first
    set_random_state(checkpoints.newest(tmp_path)["random"], CPU, **given)
    assert drawn() == first


def test_a_generator_that_is_missing_is_named():
    state = random_state(CPU, train=[torch.Generator()])
    with pytest.warns(
        UserWarning, match=r"generator train.0 is only in the checkpoint.* goes on, but with other random"
    ):
        set_random_state(state, CPU, train=[])
    with pytest.warns(UserWarning, match=r"generator train.1 is only in this run"):
        set_random_state(state, CPU, train=[torch.Generator(), torch.Generator()])
    with warnings.catch_warnings():
        set_random_state(state, CPU, train=[torch.Generator()])
