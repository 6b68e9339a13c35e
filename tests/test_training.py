"""Training: the loop against one written bare, and words for mistakes."""

import csv
import errno
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from short_run import SHORT, Line, assert_same, tables, three_numbers
from torch import Tensor, nn

from ldm_edu import training
from ldm_edu.runtime import UserError
from ldm_edu.training import Settings, fit, override
from ldm_edu.training.diffusion import DiffusionSettings
from ldm_edu.training.first_stage import FirstStageSettings
from ldm_edu.training.fit import _players, learning_rate, step_generator, update_ema
from ldm_edu.training.state import History


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit is promised there."""
    monkeypatch.setenv("LDM_EDU_DEVICE", "cpu")


def test_the_loop_is_the_one_of_the_books():
    settings = Settings(
        steps=30, learning_rate=0.1, warmup=5, gradient_clip=0.3, ema_decay=0.8, precision="no", log_every=10
    )
    readings = []
    trained, bare = Line(), Line()
    history = fit(trained, three_numbers, settings, on_step=lambda step, means: readings.append((step, means)))

    optimizer = torch.optim.AdamW(bare.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    average, losses = [w.detach().clone() for w in bare.parameters()], []
    for step in range(30):
        lr = 0.1 * ((step + 1) / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / 25)))
        optimizer.param_groups[0]["lr"] = lr
        generator = step_generator(0, step)
        loss, _ = bare(three_numbers(generator), generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 0.3)
        optimizer.step()
        decay = min(0.8, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * w.detach() for a, w in zip(average, bare.parameters())]
        losses.append(loss.item())
    for weight, expected in zip(trained.parameters(), average):
        torch.testing.assert_close(weight.detach(), expected, atol=1e-6, rtol=1e-5)
    assert [step for step, _ in readings] == [10, 20, 30]
    for i, (_, means) in enumerate(readings):
        assert means["loss"] == pytest.approx(sum(losses[10 * i : 10 * i + 10]) / 10, rel=1e-5)
        assert set(means) == {"loss", "gradient_norm", "noise"}
    assert [row["step"] for row in history.rows] == ["10", "20", "30"]
    assert losses[-1] < losses[0]


def test_the_learning_rate_rises_to_its_height_and_ends_near_zero():
    settings = Settings(steps=100, learning_rate=0.2, warmup=10)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.02) and rates[9] == rates[10] == 0.2 and rates[55] == pytest.approx(0.1)
    assert 0 < rates[99] < 0.001 and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(replace(settings, warmup=0), 0) == 0.2


@pytest.mark.parametrize("step, decay", [(0, 1 / 10), (8, 9 / 18), (89, 90 / 99), (10**6, 0.95)])
def test_the_average_forgets_faster_at_first(step: int, decay: float):
    average = [torch.tensor([1.0, -2.0])]
    update_ema(average, [torch.tensor([3.0, 4.0])], 0.95, step)
    torch.testing.assert_close(average[0], torch.tensor([3 - 2 * decay, 4 - 6 * decay]))


def test_every_step_draws_anew_and_every_seed_differently():
    seen = []
    for seed in (0, 1, 2**32 - 1):
        fit(Line(), lambda g: seen.append(three_numbers(g)) or seen[-1], replace(SHORT, seed=seed))
    assert len(seen) == 18 and len({tuple(batch.flatten().tolist()) for batch in seen}) == 18
    places = product(range(5), range(50), range(8))
    draws = {torch.rand(1, generator=step_generator(*place)).item() for place in places}
    assert len(draws) >= 5 * 50 * 8 - 3  # 24 bits: a few may be equal by chance


# mistakes


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"speed": "9"}, ["'speed'", "learning_rate"]), ({"steps": "many"}, ["steps", "int", "'many'"]),
        ({"steps": "1.5"}, ["steps", "'1.5'"]), ({"steps": "0"}, ["steps", "at least 1", "0"]),
        ({"batch_size": "-4"}, ["batch_size", "-4"]), ({"learning_rate": "fast"}, ["learning_rate", "'fast'"]),
        ({"learning_rate": "0"}, ["learning_rate", "0"]), ({"learning_rate": "nan"}, ["learning_rate", "nan"]),
        ({"learning_rate": "-1e-3"}, ["learning_rate"]), ({"kl_weight": "inf"}, ["kl_weight", "inf"]),
        ({"save_every": "70"}, ["70", "multiple of log_every"]), ({"log_every": "0"}, ["log_every", "0"]),
        ({"precision": "fp8"}, ["precision", "'fp8'"]), ({"ema_decay": "1"}, ["ema_decay", "1"]),
        ({"beta1": "2"}, ["beta1", "2"]), ({"warmup": "-1"}, ["warmup", "-1"]), ({"seed": "-1"}, ["seed", "-1"]),
        ({"seed": str(2**40)}, ["seed"]), ({"size": "0"}, ["size", "0"]),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(changes: dict[str, str], words: list[str], tmp_path: Path):
    with pytest.raises(UserError) as error:
        training.train("shapes-kl-f4", tmp_path / "out", settings=changes, size="cpu")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "out").exists()


def test_settings_of_a_recipe_keep_their_types():
    changed = override(DiffusionSettings(), {"steps": "7", "learning_rate": "2e-4", "prediction": "v"})
    assert changed == DiffusionSettings(steps=7, learning_rate=2e-4, prediction="v")
    with pytest.raises(UserError, match="pictures"):
        override(DiffusionSettings(), {"pictures": "0"})
    assert isinstance(override(FirstStageSettings(), {"size": "32"}), FirstStageSettings)


def test_unknown_recipes_and_sizes_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="'shapes-gan'.*shapes-kl-f4, shapes-text, pixels-64, .*, sweep-kl-f2"):
        training.train("shapes-gan", tmp_path / "out")
    with pytest.raises(UserError, match="cpu, gpu, not 'huge'"):
        training.train("shapes-kl-f4", tmp_path / "out", size="huge")
    assert not list(tmp_path.iterdir())


def test_where_a_run_cannot_be_saved(tmp_path: Path):
    with pytest.raises(UserError, match="no/such"):
        fit(Line(), three_numbers, SHORT, tmp_path / "no/such/out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        fit(Line(), three_numbers, SHORT, tmp_path / "file", resume=True)
    fit(Line(), three_numbers, SHORT, tmp_path / "out")
    before = tables(tmp_path / "out")[1]
    with pytest.raises(UserError, match="not empty.*--resume"):
        fit(Line(), three_numbers, SHORT, tmp_path / "out")
    assert tables(tmp_path / "out")[1] == before and (tmp_path / "file").read_text() == "mine"
    foreign = tmp_path / "foreign"  # a committed checkpoint, say: it has a history.csv, too
    foreign.mkdir()
    for name in ("history.csv", "README.md"):
        (foreign / name).write_text("mine")
    with pytest.raises(UserError, match="No run was saved in .*foreign, but README.md is there"):
        fit(Line(), three_numbers, SHORT, foreign, resume=True)
    assert {path.read_text() for path in foreign.iterdir()} == {"mine"}


def test_a_run_that_failed_at_once_can_be_started_again(tmp_path: Path):
    def refused(_: torch.Generator) -> Tensor:
        raise UserError("no pictures")

    with pytest.raises(UserError, match="no pictures"):
        fit(Line(), refused, SHORT, tmp_path / "out")
    fit(Line(), three_numbers, SHORT, tmp_path / "out")
    with pytest.warns(UserWarning, match="No step was saved in .*: the run begins at step 0"):
        fit(Line(), three_numbers, SHORT, tmp_path / "new", resume=True)
    assert_same(tmp_path / "new", tmp_path / "out")


def test_a_full_disk_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ldm_edu.training.state.write_folder", full)
        with pytest.raises(UserError, match="Cannot save to .*No space left on device.*make room"):
            fit(Line(), three_numbers, SHORT, tmp_path / "out")
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match="Cannot save to .*other.*No space left on device"):
        fit(Line(), three_numbers, SHORT, tmp_path / "other")


def test_the_precision_is_that_of_one_run_only():
    """Also where the run before was interrupted."""
    rounds: list[bool] = []

    class Watched(Line):
        def forward(self, *given: object) -> tuple:
            rounds.append(torch.is_autocast_enabled("cpu"))
            return super().forward(*given)

    objective = Watched()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for precision, on_step in (("bf16", interrupted), ("no", None), ("bf16", None)):
        settings = replace(SHORT, steps=2, log_every=1, precision=precision)
        with pytest.raises(KeyboardInterrupt) if on_step else nullcontext():
            fit(objective, three_numbers, settings, on_step=on_step)
    objective(three_numbers(generator := step_generator(0, 0)), generator)
    assert rounds == [True] + [False] * 2 + [True] * 2 + [False]


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path):
    path = tmp_path / "history.csv"
    path.write_text("step,loss\n50,0.5\n100,0.4\n1")
    assert History(path, keep_to=100).text() == path.read_text() == "step,loss\n50,0.5\n100,0.4\n"


def test_readings_that_are_there_now_and_then(tmp_path: Path):
    class Rare(Line):
        """A reading of 100 at every fifth step, and one that ends."""

        count = 0

        def forward(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            loss, _ = super().forward(batch, generator)
            self.count += 1
            rare = {"rare": torch.tensor(100.0)} if self.count % 5 == 0 else {}
            return loss, rare | ({"early": torch.tensor(1.0)} if self.count < 3 else {}) | {"last": torch.tensor(7.0)}

    fit(Rare(), three_numbers, replace(SHORT, steps=6, log_every=2, save_every=2), tmp_path / "run")
    with open(tmp_path / "run" / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["early"], row["last"], row["rare"]) for row in rows] == [
        ("2", "1", "7", ""), ("4", "", "7", ""), ("6", "", "7", "100")
    ]  # fmt: skip
    assert History(tmp_path / "run" / "history.csv", keep_to=4).text().count("\n") == 3


def test_a_compiled_objective_has_the_same_players():
    objective = nn.ModuleDict({"model": nn.Linear(2, 2), "discriminator": nn.Linear(2, 1)})
    wrapped = torch.compile(objective, backend="eager")
    assert [len(player) for player in _players(wrapped)] == [len(player) for player in _players(objective)] == [2, 2]


def test_a_run_is_not_resumed_with_other_settings_or_another_model(tmp_path: Path):
    fit(Line(), three_numbers, SHORT, tmp_path / "out")
    before = tables(tmp_path / "out")
    with pytest.raises(UserError, match=r"other settings \(steps, seed\)"):
        fit(Line(), three_numbers, replace(SHORT, steps=8, seed=1), tmp_path / "out", resume=True)
    wider = Line()
    wider.line = nn.Linear(3, 4)
    with pytest.raises(UserError, match=r"does not fit.*line\.(weight|bias)"):
        fit(wider, three_numbers, SHORT, tmp_path / "out", resume=True)
    after = tables(tmp_path / "out")
    assert after[1] == before[1] and all(torch.equal(after[0][n], before[0][n]) for n in before[0])


def test_what_ends_is_in_evaluation_and_frozen_through_there_is_nothing_to_train():
    line = Line()
    fit(line, three_numbers, SHORT)
    assert not line.training and not line.line.training
    with pytest.raises(UserError, match="nothing to train"):
        fit(line.requires_grad_(False), three_numbers, SHORT)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_state_is_named(name: str, tmp_path: Path):
    fit(Line(), three_numbers, SHORT, tmp_path / "out")
    (state,) = (tmp_path / "out").glob("step-*")
    os.truncate(state / name, 20)
    with pytest.raises(UserError, match="step-0000006 is damaged"):
        fit(Line(), three_numbers, SHORT, tmp_path / "out", resume=True)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_is_said_and_leaves_the_last_state_whole(what: str, tmp_path: Path):
    class Diverging(Line):
        def forward(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            loss, readings = super().forward(batch, generator)
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 5 and what == "loss":
                loss = loss / 0
            if self.calls == 5 and what == "gradient":  # the root has the value 0 there, and no slope
                loss = loss + (self.line.weight - self.line.weight.detach()).abs().sum().sqrt()
            return loss, readings

    with pytest.raises(UserError, match=r"(inf|nan).*step 5.*learning_rate"):
        fit(Diverging(), three_numbers, SHORT, tmp_path / "out")
    tensors, history = tables(tmp_path / "out")
    assert all(t.isfinite().all() for t in tensors.values())
    assert [row["step"] for row in csv.DictReader(history.splitlines())] == ["1", "2", "3", "4"]
    fit(Line(), three_numbers, SHORT, tmp_path / "out", resume=True)
    fit(Line(), three_numbers, SHORT, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "out")
