"""What was measured of the sweep is what the documents and notebooks say of it."""

from statistics import fmean

import pytest

from ldm_edu import checkpoint
from ldm_edu.evaluation.comparison import committed_rows, seeds_table, values
from ldm_edu.training.health import SEEDS

SETS = ["set14", "held-out"]


@pytest.mark.parametrize("pictures", SETS)
def test_every_checkpoint_and_every_seed_was_measured(pictures: str):
    found = {(row["name"], row["seed"]) for row in committed_rows(pictures) if row["kind"] != "bicubic"}
    expected = {(name, 0) for name in checkpoint.names("sweep-")}
    for path in SEEDS.glob("*.csv"):
        name, _, seed = path.stem.rpartition("-seed")
        expected.add((name, int(seed)))
    assert found == expected
    for name in ("sweep-kl-f4", "sweep-vq-f4", "sweep-kl-f4-l1", "sweep-kl-f4-more", "sweep-kl-f4-gan"):
        assert {seed for other, seed in found if other == name} == {0, 1, 2}


@pytest.mark.parametrize("pictures", SETS)
def test_what_the_sweep_shows(pictures: str):
    rows = committed_rows(pictures)
    (bicubic,) = values(rows, "bicubic-f4", "psnr")
    for kind in ("kl", "vq"):
        assert min(values(rows, f"sweep-{kind}-f4", "psnr")) > bicubic + 2.5
        means = [fmean(values(rows, f"sweep-{kind}-f{f}", "psnr")) for f in (2, 4, 8, 16)]
        assert means == sorted(means, reverse=True)
    assert min(values(rows, "sweep-vq-f4", "usage")) > 0.9
    pairs = zip(values(rows, "sweep-kl-f4-more", "frechet"), values(rows, "sweep-kl-f4-gan", "frechet"), strict=True)
    assert all(adversarial < without for without, adversarial in pairs)


def test_a_table_of_seeds():
    rows = [
        {"name": "b", "seed": seed, "psnr": 20.0 + seed, "ssim": 0.5, "perceptual": 0.25, "frechet": 1.0}
        for seed in (2, 0, 1)
    ]
    assert values(rows, "b", "psnr") == [20, 21, 22]
    head, _, row = seeds_table(rows, ["b"]).splitlines()
    assert head == "| name | seeds | PSNR dB | SSIM | perceptual | Fréchet |"
    assert row == "| b | 3 | 21.00 ± 1.00 | 0.500 ± 0.000 | 0.2500 ± 0.0000 | 1.000 ± 0.000 |"
    assert seeds_table(rows[:1], ["b"]).splitlines()[2] == "| b | 1 | 22.00 | 0.500 | 0.2500 | 1.000 |"
