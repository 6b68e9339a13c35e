"""`ldm-edu evaluate` of a text model: what each group asks for, and what counts as faithful."""

import re

import pytest
import torch
from torch import Tensor

from ldm_edu.datasets.captions import SAME_SIZE, Thing
from ldm_edu.datasets.shapes import ShapeScenes
from ldm_edu.evaluation.faithfulness import GROUPS, faithfulness, wanted_things, without_sizes
from ldm_edu.runtime import UserError

COUNT, SEED = 10, 3
OTHER = {"small": "large", "large": "small"}
SIZE_WORDS = {word for words in SAME_SIZE.values() for word in words}


class Painter:
    """Stands in for a model: it paints the scene that a caption is of, or for some groups that of its neighbour."""

    device = torch.device("cpu")

    def __init__(self, *confused: str) -> None:
        self.pictures: dict[str, Tensor] = {}
        self.calls: list[dict] = []
        for group, arguments in GROUPS.items():
            scenes = ShapeScenes(64, count=COUNT, seed=SEED, **arguments)
            texts = scenes.captions(range(COUNT), full=True)
            if group == "no_sizes":
                texts = without_sizes(wanted_things(scenes))
            images = scenes.images(range(COUNT)).roll(int(group in confused), dims=0)
            self.pictures |= dict(zip(texts, images, strict=True))

    def sample(self, prompts: list[str], **options: object) -> Tensor:
        self.calls.append({"prompts": prompts} | options)
        return torch.stack([self.pictures[prompt] for prompt in prompts])

    def to_latent(self, images: Tensor) -> Tensor:
        return images / 2

    def to_image(self, z: Tensor) -> Tensor:
        return z * 2


def test_each_group_is_counted():
    painter, seen = Painter(), []
    report = faithfulness(painter, COUNT, SEED, num_steps=7, guidance_scale=2.0, batch_size=4, on_progress=seen.append)
    shares = dict.fromkeys(("one", "two", "no_sizes", "held_out", "ceiling"), 1.0) | {"shuffled": 0.0}
    assert report == {"faithfulness": shares, "captions": COUNT, "seed": SEED}
    assert sum(seen) == len(GROUPS) * COUNT and {len(call["prompts"]) for call in painter.calls} == {4, 2}
    assert all(call["num_steps"] == 7 and call["guidance_scale"] == 2 for call in painter.calls)
    assert [call["seeds"] for call in painter.calls[:3]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("group", GROUPS)
def test_a_wrong_picture_counts_in_its_group_alone(group: str):
    shares = faithfulness(Painter(group), COUNT, SEED)["faithfulness"]
    assert shares[group] == 0 and shares["ceiling"] == 1
    assert all(shares[other] == 1 for other in GROUPS if other != group)


def test_sizes_are_open_where_the_caption_names_none(monkeypatch: pytest.MonkeyPatch):
    def of_other_sizes(scenes: ShapeScenes) -> list[tuple[Thing, ...]]:
        return [tuple(t._replace(size=OTHER[t.size]) for t in things) for things in wanted_things(scenes)]

    painter = Painter()
    monkeypatch.setattr("ldm_edu.evaluation.faithfulness.wanted_things", of_other_sizes)
    shares = faithfulness(painter, COUNT, SEED)["faithfulness"]
    assert [name for name, share in shares.items() if share] == ["no_sizes"] and shares["no_sizes"] == 1


def test_captions_without_sizes_say_all_the_rest():
    things = wanted_things(ShapeScenes(64, count=70, seed=SEED, objects=(2, 2)))
    captions = without_sizes(things)
    for caption, pair in zip(captions, things, strict=True):
        words = re.findall(r"\w+", caption)
        assert not SIZE_WORDS & set(words) and all(f"{t.colour} {t.shape}" in caption for t in pair)
        assert {"above", "below", "left", "right"} & set(words)
    assert {"there", "and", "picture"} <= set(" ".join(captions).split())  # every phrasing


def test_refused():
    for arguments, words in (((0, 1), "must be at least 1; it is 0"), ((4, 0), "Seed 0 makes the training scenes")):
        with pytest.raises(UserError, match=words):
            faithfulness(Painter(), *arguments)
