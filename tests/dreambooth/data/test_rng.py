"""Counted randomness: stable for ever, spread evenly, and each stream its own."""

import pytest
import torch

from rayjobs.dreambooth.data import rng


@pytest.mark.parametrize(
    ("names", "value"),
    [((0, 1, 2, "instance"), 1_058_153_966_147_354_403), (("order",), 4_908_470_338_496_592_349)],
)
def test_keys_never_change(names: tuple[int | str, ...], value: int) -> None:
    assert rng.key(*names) == value
    assert 0 <= value < 2**63


def test_the_streams_behind_keys_never_change() -> None:
    assert rng.uniform(0, 1, 2, "instance") == pytest.approx(0.11472528289211145)
    assert rng.permutation(6, 0, 0, "instance", "order") == (5, 0, 1, 4, 2, 3)
    assert rng.normal((2,), 0, 1, 2, "noise").tolist() == pytest.approx([-0.694259, -2.755939])


def test_names_are_kept_apart() -> None:
    assert len({rng.key(*names) for names in ((1, 23), (12, 3), (123,), (1, 2, 3))}) == 4
    assert rng.key("a", "b") != rng.key("b", "a")
    numbered = {rng.key(seed, step, 0) for seed in range(50) for step in range(50)}
    assert len(numbered) == 2500


def test_one_number_is_uniform() -> None:
    values = torch.tensor([rng.uniform(5, n, "level") for n in range(20000)], dtype=torch.float64)
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.01)
    assert values.var().item() == pytest.approx(1 / 12, abs=0.002)
    counts = torch.histc(values, 20, 0, 1)
    assert (counts - 1000).abs().max() < 150
    assert abs(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]) < 0.03


def test_normal_numbers_are_normal_and_each_rows_own() -> None:
    rows = torch.stack([rng.normal((4, 32, 32), 0, 7, n, "noise").flatten() for n in range(8)])
    assert rows.dtype == torch.float32
    assert rows.mean().item() == pytest.approx(0, abs=0.03)
    assert rows.std().item() == pytest.approx(1, abs=0.03)
    assert (torch.corrcoef(rows) - torch.eye(8)).abs().max() < 0.08


def test_a_permutation_has_every_number_once() -> None:
    found = [rng.permutation(50, 0, epoch, "order") for epoch in range(20)]
    assert all(sorted(order) == list(range(50)) for order in found)
    assert len(set(map(tuple, found))) == 20
    assert rng.permutation(1, 0) == (0,)


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_as_many_are_kept_as_asked(drop: float) -> None:
    keys_B = torch.tensor([rng.key(0, row, "dropout") for row in range(4)])
    kept_BN = rng.keep_mask(keys_B, 250_000, drop)
    assert (kept_BN.shape, kept_BN.dtype) == ((4, 250_000), torch.bool)
    assert kept_BN.float().mean().item() == pytest.approx(1 - drop, abs=0.01)
    for row_N in kept_BN:
        assert row_N.float().mean().item() == pytest.approx(1 - drop, abs=0.01)
        pairs = (row_N[1:] & row_N[:-1]).float().mean().item()
        assert pairs == pytest.approx((1 - drop) ** 2, abs=0.01)


def test_rows_are_dropped_independently() -> None:
    keys = [rng.key(0, row, "dropout") for row in range(6)] + [0, 1, 2**32, 2**62]
    kept_BN = rng.keep_mask(torch.tensor(keys), 100_000, 0.3).float()
    assert (torch.corrcoef(kept_BN) - torch.eye(len(keys))).abs().max() < 0.02


def test_a_mask_is_a_function_of_key_and_place() -> None:
    keys_B = torch.tensor([rng.key(0, row, "dropout") for row in range(3)])
    kept_BN = rng.keep_mask(keys_B, 1000, 0.4)
    assert torch.equal(rng.keep_mask(keys_B, 1000, 0.4), kept_BN)
    assert torch.equal(rng.keep_mask(keys_B[1:2], 300, 0.4), kept_BN[1:2, :300])
    assert torch.equal(rng.keep_mask(keys_B.flip(0), 1000, 0.4), kept_BN.flip(0))
    more_BN = rng.keep_mask(keys_B, 1000, 0.1)
    assert (more_BN | ~kept_BN).all()
    assert "".join(str(int(kept)) for kept in kept_BN[0, :24]) == "011011101000010011101101"


def test_streams_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    rng.normal((8,), 1)
    rng.permutation(8, 1)
    rng.keep_mask(torch.tensor([5]), 8, 0.5)
    assert torch.equal(torch.random.get_rng_state(), before)
