"""First stages side by side: what the numbers of a row mean, and the command that prints them."""

import json
from pathlib import Path
from types import SimpleNamespace

import first_stages
import pytest
import torch
from commands import photo, refused, run
from torch import Tensor

from ldm_edu import checkpoint
from ldm_edu.autoencoder import FirstStage, Identity, PerceptualConfig, PerceptualNetwork
from ldm_edu.datasets import ShapeScenes
from ldm_edu.evaluation import comparison
from ldm_edu.evaluation.reconstruction import bicubic_copy

pytest_plugins = ["commands"]


def judge() -> PerceptualNetwork:
    torch.manual_seed(0)
    return PerceptualNetwork(PerceptualConfig(widths=(4, 8))).eval()


@pytest.fixture
def any_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison.PerceptualNetwork, "load", classmethod(lambda cls, name: judge()))


def pictures(count: int = 24, size: int = 64) -> list[Tensor]:
    return list(ShapeScenes(size, count=count, seed=3).images(range(count)))


def test_frechet_distance_is_that_of_the_two_normal_distributions():
    images = pictures()
    other = [(image * 0.6 + 0.2).clamp(-1, 1) for image in images]

    def moments(sets: list[Tensor]) -> tuple[Tensor, Tensor]:
        levels = torch.stack(sets).add(1).mul(127.5).round() / 127.5 - 1
        with torch.no_grad():
            features = judge()(levels)[-1].mean(dim=(2, 3)).double()
        return features.mean(0), features.T.cov()

    (mean1, cov1), (mean2, cov2) = moments(images), moments(other)
    root = torch.linalg.eigvals(cov1 @ cov2).sqrt().real.sum()
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root
    found = comparison.frechet_distance(images, other, judge())
    assert found == pytest.approx(float(expected), rel=1e-3) and found > 0
    assert comparison.frechet_distance(images, images, judge()) == pytest.approx(0, abs=1e-5)


def test_patches_are_the_pictures_own_pixels_and_the_rest_is_left_out():
    image = torch.linspace(-1, 1, 3 * 140 * 70).view(3, 140, 70)
    tiles = comparison._patches(image)
    assert tiles.shape == (2, 3, 64, 64) and tiles.dtype == torch.uint8
    torch.testing.assert_close(tiles[1].float() / 127.5 - 1, image[:, 64:128, :64], atol=0.004, rtol=0)


def test_rows_tell_a_perfect_first_stage_from_a_bicubic_copy(any_judge: None):
    images = pictures(4)
    result = comparison.compare({"pixels": Identity(), "vq": first_stages.ours(first_stages.VQ)}, images)
    rows = {row["name"]: row for row in result["rows"]}
    assert result["images"] == 4 and list(rows) == ["pixels", "vq", "bicubic-f2"]
    assert rows["pixels"]["psnr"] == 100 and rows["pixels"]["perceptual"] == pytest.approx(0, abs=1e-6)
    assert rows["pixels"]["usage"] is None and rows["pixels"]["codebook"] is None
    copies = [bicubic_copy(image, 2) for image in images]
    assert rows["bicubic-f2"]["frechet"] == pytest.approx(comparison.frechet_distance(images, copies, judge()))
    vq = rows["vq"]
    assert (vq["f"], vq["channels"], vq["codebook"], vq["kind"]) == (2, 3, 50, "vq")
    stage = first_stages.ours(first_stages.VQ)
    used = torch.cat([stage.quantizer.codes(stage.encode(image[None])) for image in images]).unique()
    assert 0 < vq["usage"] <= 1 and abs(vq["usage"] - len(used) / 50) <= 0.04  # bfloat16 may tip a near-tie


def test_the_table_has_a_line_for_each(any_judge: None):
    result = comparison.compare({"vq": first_stages.ours(first_stages.VQ)}, pictures(2))
    lines = comparison.table(result["rows"]).splitlines()
    assert len(lines) == 4 and lines[0].count("|") == lines[2].count("|") == lines[3].count("|")
    assert f"{result['rows'][0]['psnr']:.2f}" in lines[2] and "%" in lines[2] and "%" not in lines[3]


def test_several_first_stages_are_compared_on_a_folder(models: SimpleNamespace, here: Path, any_judge: None):
    photo(here / "set" / "1.png", 70, 80)
    photo(here / "set" / "2.png", 130, 64)
    (here / "set" / "broken.png").write_bytes(b"")
    first_stages.ours(first_stages.VQ).save(here / "vq", "card")
    result = run("evaluate", models.first, "vq", "--data", "set", "--json")
    assert "Skipped" in result.stderr and "broken.png" in result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in rows][:2] == [str(models.first), "vq"] and json.loads(result.stdout)["images"] == 2
    assert run("evaluate", models.first, "vq", "--data", "set").stdout.count("\n") == len(rows) + 2


def test_a_text_model_is_not_compared(models: SimpleNamespace, here: Path):
    refused(run("evaluate", models.first, models.text, "--data", "set"), "text model", "alone")


def test_the_scenes_are_read_back_as_the_command_says(here: Path):
    scenes = json.loads(run("evaluate", "shapes", "--seed", "2", "--json").stdout)
    assert list(scenes) == ["pictures_per_second", "read", "read_reconstructed", "count", "seed"]
    assert scenes["read"] >= 0.995 and 0.97 < scenes["read_reconstructed"] <= 1
    assert scenes["count"] == 1000 and scenes["seed"] == 2


def test_the_sweep_is_what_is_committed_of_it():
    found = checkpoint.names("sweep-")
    assert {"sweep-kl-f4", "sweep-vq-f4"} <= set(found) and "photos-kl-f4" not in found
    assert {FirstStage.load(name).f for name in found} == {2, 4, 8, 16}
