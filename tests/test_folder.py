"""Folders of pictures: the three layouts, damage, captions that forbid mirroring, the same draws again."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_edu.datasets.folder import ImageFolder, mentions_side
from ldm_edu.runtime import UserError


def save(path: Path, width: int = 24, height: int = 16, seed: int = 0) -> Path:
    """A smooth picture, dark at the left and bright at the right, so that a mirrored one is told apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.random.default_rng(seed).integers(0, 50, 3)
    Image.fromarray(np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8)).save(path)
    return path


def is_mirrored(image: torch.Tensor) -> bool:
    return bool(image[..., 0].mean() > image[..., -1].mean())


def write_metadata(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for name in ("c.png", "a.jpg", "b.webp"):
        save(tmp_path / "flat" / name)
    return tmp_path / "flat"


def test_flat_folder(flat: Path):
    (flat / "notes.txt").write_text("not a picture")
    (flat / ".hidden.png").write_text("nor this")
    folder = ImageFolder(flat, 8)
    assert [entry.path.name for entry in folder.entries] == ["a.jpg", "b.webp", "c.png"]
    assert folder[0].keys() == {"image"} and folder[0]["image"].shape == (3, 8, 8)
    assert folder.classes == [] and folder.labels == [] and folder.captions == ["", "", ""]
    assert torch.equal(folder[-1]["image"], folder[2]["image"])
    with pytest.raises(IndexError):
        folder[3]


def test_class_folders(tmp_path: Path):
    save(tmp_path / "dog" / "1.png")
    save(tmp_path / "cat" / "deeper" / "2.png")
    save(tmp_path / "cat" / "1.PNG")
    folder = ImageFolder(tmp_path, 8)
    assert folder.classes == ["cat", "dog"] and folder.labels == [0, 0, 1]
    assert folder[2]["label"] == 1 and set(folder[2]) == {"image", "label"}


def test_metadata_captions_labels_masks(tmp_path: Path):
    save(tmp_path / "x" / "1.png")
    save(tmp_path / "x" / "2.png")
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[:, 12:] = 7
    (tmp_path / "m").mkdir()
    Image.fromarray(mask).save(tmp_path / "m" / "1.png")
    rows = [
        {
            "file_name": "x/2.png",
            "caption": "a ramp",
            "text": "ignored",
            "label": 3,
            "mask_file_name": "m/1.png",
        },
        {"file_name": "x/1.png", "text": "ein Übergang", "label": 0, "mask_file_name": "m/1.png"},
    ]
    write_metadata(tmp_path, rows)
    folder = ImageFolder(tmp_path, 8)
    assert folder.captions == ["a ramp", "ein Übergang"] and folder.labels == [3, 0]  # in the file's order
    item = folder[0]
    assert item["caption"] == "a ramp" and item["label"] == 3 and len(folder.classes) == 4
    assert item["mask"].dtype == torch.int64 and item["mask"][0].tolist() == [0] * 4 + [7] * 4


def test_labels_by_name(tmp_path: Path):
    save(tmp_path / "1.png")
    write_metadata(tmp_path, [{"file_name": "1.png", "label": name} for name in ("newt", "eft", "newt")])
    folder = ImageFolder(tmp_path, 8)
    assert folder.classes == ["eft", "newt"] and folder.labels == [1, 0, 1]


def test_every_second_label_is_an_error(tmp_path: Path):
    save(tmp_path / "1.png")
    write_metadata(tmp_path, [{"file_name": "1.png", "label": 1}, {"file_name": "1.png"}])
    with pytest.raises(UserError, match=r"1 of 2 pictures .* have no label"):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("labels", [[-1, 0], ["cat", 0]])
def test_labels_that_are_no_class_numbers(tmp_path: Path, labels: list):
    save(tmp_path / "1.png")
    write_metadata(tmp_path, [{"file_name": "1.png", "label": label} for label in labels])
    with pytest.raises(UserError, match="use names, or numbers from 0 on"):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "file_name"),
        ('{"caption": "no name"}', "file_name"),
        ('{"file_name": "1.png", "caption": 5}', "caption must be text"),
        ('{"file_name": "1.png", "label": 1.5}', "label must be"),
        ('{"file_name": "1.png", "mask_file_name": 1}', "mask_file_name must be"),
    ],
)
def test_bad_line_of_metadata_is_named(tmp_path: Path, line: str, complaint: str):
    save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"metadata\.jsonl, line 2.*{complaint.removeprefix('line 2: ')}"):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("name", ["../secret.png", "x/../../secret.png", "/etc/passwd", ".", "", "a\0b.png"])
@pytest.mark.parametrize("key", ["file_name", "mask_file_name"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str, key: str):
    save(tmp_path / "secret.png")
    save(tmp_path / "set" / "1.png")
    write_metadata(tmp_path / "set", [{"file_name": "1.png", key: name}])
    with pytest.raises(UserError, match="is not inside"):
        ImageFolder(tmp_path / "set", 8)


def test_names_of_missing_files_are_skipped_and_named(tmp_path: Path):
    save(tmp_path / "1.png")
    write_metadata(tmp_path, [{"file_name": "gone.png"}, {"file_name": "1.png"}])
    with pytest.warns(UserWarning, match=r"Skipped 1 picture .*gone\.png"):
        assert len(ImageFolder(tmp_path, 8)) == 1
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match="None of the 2 files"):
        ImageFolder(tmp_path, 8)


def break_two(flat: Path) -> None:
    (flat / "0_empty.png").write_bytes(b"")
    whole = save(flat / "whole.png").read_bytes()
    (flat / "bb_cut.png").write_bytes(whole[: len(whole) // 2])
    (flat / "whole.png").unlink()


def test_broken_pictures_are_skipped_and_named_once(flat: Path):
    break_two(flat)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = ImageFolder(flat, 8)
    assert len(caught) == 1 and "Skipped 2 pictures" in str(caught[0].message)
    assert "0_empty.png" in str(caught[0].message) and "bb_cut.png" in str(caught[0].message)
    assert [entry.path.name for entry in folder.entries] == ["a.jpg", "b.webp", "c.png"]


def test_cache_drops_broken_pictures_and_stays_in_step(flat: Path):
    break_two(flat)
    folder = ImageFolder(flat, 8, check=False)
    assert len(folder) == 5
    with pytest.warns(UserWarning, match="Skipped 2 pictures"):
        cache = folder.as_tensor_cache()
    assert cache.dtype == torch.uint8 and cache.shape == (3, 3, 8, 8) and len(folder) == 3
    for index, row in enumerate(cache):
        assert (row.float() / 127.5 - 1 - folder[index]["image"]).abs().max() <= 0.5 / 127.5 + 1e-6


def test_unchecked_broken_picture_is_an_error_when_read(flat: Path):
    break_two(flat)
    with pytest.raises(UserError, match=r"0_empty\.png"):
        ImageFolder(flat, 8, check=False)[0]


def test_mask_of_another_size_is_skipped_and_named(tmp_path: Path):
    save(tmp_path / "1.png")
    save(tmp_path / "2.png")
    Image.new("L", (24, 16)).save(tmp_path / "good.png")
    Image.new("L", (5, 5)).save(tmp_path / "bad.png")
    rows = [{"file_name": f"{i}.png", "mask_file_name": m} for i, m in ((1, "good.png"), (2, "bad.png"))]
    write_metadata(tmp_path, rows)
    with pytest.warns(UserWarning, match=r"2\.png"):
        assert len(ImageFolder(tmp_path, 8)) == 1


def test_only_broken_pictures(tmp_path: Path):
    (tmp_path / "one.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"one\.png .*0 bytes"):
        ImageFolder(tmp_path, 8)
    save(tmp_path / "one.png")
    Image.new("L", (5, 5)).save(tmp_path / "bad.png")
    write_metadata(tmp_path, [{"file_name": "one.png", "mask_file_name": "bad.png"}])
    with pytest.raises(UserError, match=r"bad\.png is 5 x 5"):
        ImageFolder(tmp_path, 8)


def test_folders_without_pictures(tmp_path: Path):
    with pytest.raises(UserError, match="There is no folder"):
        ImageFolder(tmp_path / "nowhere", 8)
    with pytest.raises(UserError, match="holds no pictures"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(UserError, match="is a file"):
        ImageFolder(save(tmp_path / "x" / "1.png"), 8)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        ImageFolder(tmp_path, 8)


def test_splits_are_not_taken_for_classes(tmp_path: Path):
    for split in ("train", "test"):
        save(tmp_path / split / "1.png")
        write_metadata(tmp_path / split, [{"file_name": "1.png"}])
    with pytest.raises(UserError, match=r"several data sets.*train"):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("size", [0, -8])
def test_size_must_be_positive(flat: Path, size: int):
    with pytest.raises(UserError, match=f"size is {size}"):
        ImageFolder(flat, size)


@pytest.mark.parametrize(
    "caption",
    ["a cat to the left of a dog", "Right-facing fist", "LEFTMOST", "the rightmost one", "upper-left corner",
     "bottom_right", "topleft", "clockwise arrows", "counterclockwise", "anti-clockwise"],
)  # fmt: skip
def test_sides_are_noticed(caption: str):
    assert mentions_side(caption)


@pytest.mark.parametrize("caption", ["", None, "a bright star above a cleft", "upright copyright", "fright"])
def test_other_words_are_not_sides(caption: str | None):
    assert not mentions_side(caption)


word = st.sampled_from("a red star above blue bright ring of the , left, (right) Left RIGHT leftmost".split())


@settings(max_examples=25, deadline=None)
@given(st.lists(word, max_size=6).map(" ".join), st.integers(0, 2**32), st.integers(0, 1000))
def test_captions_with_a_side_are_never_mirrored(tmp_path_factory, caption: str, seed: int, epoch: int):
    folder = tmp_path_factory.mktemp("sides")
    save(folder / "1.png")
    write_metadata(folder, [{"file_name": "1.png", "caption": caption}] * 8)
    pictures = ImageFolder(folder, 8, augment=True, seed=seed)
    pictures.set_epoch(epoch)
    mirrored = [is_mirrored(item["image"]) for item in (pictures[i] for i in range(8))]
    if "left" in caption.lower() or "right" in caption.lower().replace("bright", ""):
        assert not any(mirrored)


def test_captions_without_a_side_are_mirrored_half_the_time(tmp_path: Path):
    save(tmp_path / "1.png")
    write_metadata(tmp_path, [{"file_name": "1.png", "caption": "a bright ramp"}] * 200)
    pictures = ImageFolder(tmp_path, 8, augment=True)
    assert 70 < sum(is_mirrored(pictures[i]["image"]) for i in range(200)) < 130


def test_mask_is_cut_with_its_picture(tmp_path: Path):
    save(tmp_path / "1.png", width=64, height=64)
    brightness = np.array(Image.open(tmp_path / "1.png"))[..., 0]
    Image.fromarray((brightness > 120).astype(np.uint8)).save(tmp_path / "mask.png")
    write_metadata(tmp_path, [{"file_name": "1.png", "mask_file_name": "mask.png"}] * 20)
    pictures = ImageFolder(tmp_path, 32, augment=True)
    for i in range(20):
        item = pictures[i]
        bright = item["image"][0] > 120 / 127.5 - 1
        assert (bright == item["mask"].bool()).float().mean() > 0.95


def test_draws_follow_from_seed_epoch_and_index_alone(flat: Path):
    torch.manual_seed(1)
    first = ImageFolder(flat, 8, augment=True, seed=5)
    images = [first[i]["image"] for i in range(3)]
    torch.manual_seed(2)
    np.random.seed(3)
    again = ImageFolder(flat, 8, augment=True, seed=5)
    assert all(torch.equal(again[i]["image"], images[i]) for i in (2, 0, 1))
    again.set_epoch(1)
    assert not all(torch.equal(again[i]["image"], images[i]) for i in range(3))
    other = ImageFolder(flat, 8, augment=True, seed=6)
    assert not all(torch.equal(other[i]["image"], images[i]) for i in range(3))


def test_same_in_worker_processes(flat: Path):
    pictures = ImageFolder(flat, 8, augment=True)
    alone = torch.stack([pictures[i]["image"] for i in range(3)])
    loader = torch.utils.data.DataLoader(pictures, batch_size=3, num_workers=1)
    assert torch.equal(next(iter(loader))["image"], alone)
