"""What the comparison of pixels with latents measures, on models that draw what is known."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.evaluation.faithfulness import wanted_things
from ldm_edu.evaluation.spaces import measure, rows_of_samples
from ldm_edu.training.recipes import spaces
from ldm_edu.unet import UNet

COUNT = 12


class Draws:
    """Stands for a model: picture i of the evaluation is the true scene number `order[i]`, or grey."""

    latent_size, first_stage, device = 16, SimpleNamespace(f=4), torch.device("cpu")

    def __init__(self, order: Sequence[int | None]) -> None:
        self.scenes, self.order = ShapeScenes(64, count=COUNT, seed=1, objects=(1, 1)), order

    def sample(self, captions: list[str], seeds: list[int], precision: str) -> Tensor:
        assert captions == self.scenes.captions(range(COUNT), full=True)[seeds[0] : seeds[-1] + 1]
        true = self.scenes.images(range(COUNT))
        return torch.stack([torch.zeros(3, 64, 64) if self.order[i] is None else true[self.order[i]] for i in seeds])


def test_true_scenes_wrong_scenes_and_nothing():
    right, moved, grey = (
        measure(Draws(order), pictures=COUNT, batch_size=5)
        for order in (range(COUNT), [*range(1, COUNT), 0], [None] * COUNT)
    )
    assert right["faithful"] == right["readable"] == moved["readable"] == 1
    assert right["shape"] == right["colour"] == right["size"] == 1 and grey["shape"] is None
    wanted = [scene[0] for scene in wanted_things(ShapeScenes(64, count=COUNT, seed=1, objects=(1, 1)))]
    same = [a.colour == b.colour for a, b in zip(wanted, wanted[1:] + wanted[:1], strict=True)]
    assert moved["colour"] == pytest.approx(sum(same) / COUNT) and moved["colour"] < 1
    assert moved["faithful"] < 0.5 and grey["faithful"] == grey["readable"] == 0
    assert right["frechet"] == pytest.approx(0, abs=1e-3) and grey["frechet"] > 1
    assert 0 < right["frechet_floor"] == grey["frechet_floor"] < grey["frechet"]
    assert right["pictures_per_second"] > 0 and (right["pictures"], right["scenes_seed"]) == (COUNT, 1)


def test_a_row_of_samples_for_each_model():
    class Plain:
        def __init__(self, size: int, value: float) -> None:
            self.size, self.value = size, value

        def sample(self, captions: list[str], seeds: list[int], precision: str) -> Tensor:
            assert len(captions) == len(seeds) == 3
            return torch.full((3, 3, self.size, self.size), self.value) * torch.tensor(seeds).view(3, 1, 1, 1)

    picture = rows_of_samples([Plain(2, -0.5), Plain(4, 0.25)], count=3)
    row = torch.tensor([0, 0, -0.5, -0.5, -1, -1, *[1.0] * 6])  # white where the pictures are smaller
    below = 0.25 * torch.arange(3).repeat_interleave(4)
    torch.testing.assert_close(picture, torch.stack([row] * 2 + [below] * 4).expand(3, 6, 12))


@pytest.mark.parametrize("size", [64, 128])
def test_the_models_differ_in_the_space_and_hardly_in_weights(size: int):
    pixels, latents = (spaces.RECIPES[f"{space}-{size}"].config for space in ("pixels", "latents"))
    weights = [sum(p.numel() for p in UNet(config).parameters()) for config in (pixels, latents)]
    assert weights[0] == pytest.approx(weights[1], rel=0.01)
    assert pixels.widths[-2:] == latents.widths[-2:]
    for config, f in ((pixels, 1), (latents, 4)):
        pixels_a_place = [f * 2**level for level in range(len(config.widths))]
        assert size // pixels_a_place[-1] == 4
        assert [pixels_a_place[level] for level in config.attention_levels] == [p for p in pixels_a_place if p >= 8]
