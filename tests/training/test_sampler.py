"""The order of images: every one once an epoch, the same for any number of ranks, work shared
evenly."""

import pytest
import torch

from deconvnet.training.sampler import BatchSampler

cases = pytest.mark.parametrize(
    ("images", "batch_size"), [(1, 8), (7, 3), (8, 8), (24, 8), (25, 8), (10, 1), (9, None)]
)


def epoch_of(images, batch_size, ranks, epoch=0):
    """For every batch the set of its images, and how many each rank has of them."""
    shares = [BatchSampler(images, batch_size, (5,), rank, ranks) for rank in range(ranks)]
    batches = []
    for number in range(shares[0].batches):
        parts = [share.batch(epoch, number).tolist() for share in shares]
        assert all(
            set(part) <= set(share.own_images.tolist())
            for part, share in zip(parts, shares, strict=True)
        )
        batches.append((parts, sorted(sum(parts, []))))
    return batches


@cases
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_has_every_image_once_in_batches_of_one_size_but_the_last(
    images, batch_size, epoch
):
    batches = [batch for _, batch in epoch_of(images, batch_size, 1, epoch)]
    assert sorted(sum(batches, [])) == list(range(images))
    size = min(batch_size or images, images)
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(batches) == -(-images // size)


@cases
@pytest.mark.parametrize("ranks", [2, 3, 4, 11])
def test_the_batches_are_the_same_for_any_number_of_ranks(images, batch_size, ranks):
    alone = [batch for _, batch in epoch_of(images, batch_size, 1)]
    assert [batch for _, batch in epoch_of(images, batch_size, ranks)] == alone


@cases
@pytest.mark.parametrize("ranks", [2, 3, 4, 11])
def test_no_rank_has_more_than_one_image_more_of_a_full_batch(images, batch_size, ranks):
    full = min(batch_size or images, images)
    for parts, batch in epoch_of(images, batch_size, ranks):
        if len(batch) == full:
            counts = [len(part) for part in parts]
            assert max(counts) - min(counts) <= 1


@cases
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_image_belongs_to_one_rank_and_stays_its_own(images, batch_size, ranks):
    shares = [BatchSampler(images, batch_size, (0,), rank, ranks) for rank in range(ranks)]
    assert sorted(torch.cat([share.own_images for share in shares]).tolist()) == list(range(images))
    for share in shares:
        assert torch.equal(share.own_images, share.own_images.sort().values)
        for epoch in range(3):
            visited = torch.cat([share.batch(epoch, n) for n in range(share.batches)])
            assert torch.equal(visited.sort().values, share.own_images)


def test_orders_differ_between_epochs_and_seeds_and_are_the_same_again():
    def order(seed, epoch):
        sampler = BatchSampler(64, 8, (seed,))
        return torch.cat([sampler.batch(epoch, n) for n in range(8)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != list(range(64))
