import math

import pytest
import torch
from torch import nn

from modules.metrics.fields import relative_l2, vrmse
from modules.operators.fno import FNO, FNOConfig
from modules.tasks.field_rollout import FieldRollout, FieldRolloutConfig

SPACE = [8, 6]
SPEC = {"kind": "fields", "channels": ["u", "v"], "space": SPACE, "mean": [1.0, -2.0], "std": [2.0, 0.5]}


class Linear(nn.Module):
    """`a x` of the last frame: a one-step map whose rollout is known."""

    in_channels, out_channels, dimensions, smallest_grid = 2, 2, 2, (1, 1)

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return self.factor * x[:, -2:]


def task(factor=0.5, bind=True, network=None, **changes):
    built = FieldRollout(network or Linear(factor), FieldRolloutConfig(**{"channels": 2, "space": SPACE} | changes))
    if bind:
        built.bind(SPEC)
    return built


def column(values):
    return torch.tensor(values).view(2, 1, 1)


def fields(samples=3, frames=4):
    torch.manual_seed(0)
    return column(SPEC["mean"]) + column(SPEC["std"]) * torch.randn(samples, frames, 2, *SPACE)


def normalised(x):
    return (x - column(SPEC["mean"])) / column(SPEC["std"])


def physical(x):
    return x * column(SPEC["std"]) + column(SPEC["mean"])


def means(found):
    return {name: float(total.detach()) / float(count) for name, (total, count) in found.items()}


@pytest.mark.parametrize(("residual", "factor"), [(False, 0.9), (True, -0.1)])
def test_loss_is_the_relative_error_of_each_step_in_physical_units(residual, factor):
    x = fields()
    total, count, extras = task(factor, residual=residual, rollout_steps=3).loss_terms({"fields": x})
    errors = [relative_l2(physical(0.9**k * normalised(x[:, 0])), x[:, k]) for k in (1, 2, 3)]
    assert count == 9 and extras == {}
    torch.testing.assert_close(total, torch.stack(errors).sum())


def test_mse_is_in_normalised_units():
    x = fields()
    total, count, _ = task(0.5, residual=False, loss="mse").loss_terms({"fields": x})
    torch.testing.assert_close(total / count, (0.5 * normalised(x[:, 0]) - normalised(x[:, 1])).square().mean())


def test_the_gradient_goes_through_the_whole_rollout():
    x = fields()
    built = task(0.5, residual=False, loss="mse", rollout_steps=3)
    total, _, _ = built.loss_terms({"fields": x})
    total.backward()
    z = normalised(x)
    expected = sum(
        (2 * (0.5**k * z[:, 0] - z[:, k]) * k * 0.5 ** (k - 1) * z[:, 0]).flatten(1).mean(1).sum() for k in (1, 2, 3)
    )
    torch.testing.assert_close(built.network.factor.grad, expected)


def test_a_window_of_several_frames_slides_over_its_own_predictions():
    class Delay(Linear):
        """Returns the older of the two frames: from (a, b) the rollout is a, b, a, b, ..."""

        in_channels = 4

        def forward(self, x):
            return self.factor * x[:, :2]

    x = fields(frames=6)
    x[:, 2:] = x[:, :2].repeat(1, 2, 1, 1, 1)
    built = task(network=Delay(1.0), input_frames=2, residual=False, rollout_steps=4)
    total, count, _ = built.loss_terms({"fields": x})
    assert count == 12 and total.item() < 1e-5


def test_evaluation_of_one_step():
    x = fields(frames=5)
    found = means(task(0.5, residual=False).evaluation_step({"fields": x}))
    before, after = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
    prediction = physical(0.5 * normalised(before))
    assert found["relative_l2"] == pytest.approx(relative_l2(prediction, after).mean().item(), rel=1e-5)
    assert found["vrmse"] == pytest.approx(vrmse(prediction, after).mean().item(), rel=1e-5)
    assert found["persistence_relative_l2"] == pytest.approx(relative_l2(before, after).mean().item(), rel=1e-5)
    assert found["persistence_vrmse"] == pytest.approx(vrmse(before, after).mean().item(), rel=1e-5)
    assert found["loss"] == pytest.approx(
        relative_l2(physical(0.5 * normalised(x[:, 0])), x[:, 1]).mean().item(), rel=1e-5
    )


def test_evaluation_of_the_rollout():
    x = fields(frames=5)
    found = means(task(0.5, residual=False, eval_rollout_steps=3).evaluation_step({"fields": x}))
    errors, held = [], []
    for k in (1, 2, 3):
        errors.append(relative_l2(physical(0.5**k * normalised(x[:, 0])), x[:, k]).mean().item())
        held.append(relative_l2(x[:, 0], x[:, k]).mean().item())
        assert found[f"rollout/relative_l2@{k}"] == pytest.approx(errors[-1], rel=1e-5)
        assert found[f"persistence_rollout/relative_l2@{k}"] == pytest.approx(held[-1], rel=1e-5)
    assert found["rollout_relative_l2"] == pytest.approx(sum(errors) / 3, rel=1e-5)
    assert found["persistence_rollout_relative_l2"] == pytest.approx(sum(held) / 3, rel=1e-5)
    assert found["finite_rollouts"] == 1.0
    assert "rollout/relative_l2@4" not in found


def test_the_exact_law_has_no_error_and_a_short_window_no_rollout():
    z = normalised(fields(frames=1))
    x = physical(torch.cat([0.5**k * z for k in range(5)], dim=1))
    found = means(task(0.5, residual=False).evaluation_step({"fields": x}))
    assert found["relative_l2"] < 1e-6 and found["rollout_relative_l2"] < 1e-6
    assert found["persistence_relative_l2"] > 0.05
    assert set(means(task().evaluation_step({"fields": x[:, :2]}))) == {
        "loss",
        "relative_l2",
        "vrmse",
        "persistence_relative_l2",
        "persistence_vrmse",
    }


def test_a_rollout_that_blows_up_is_counted():
    x = fields(samples=4, frames=4)
    x[0, 0] = physical(torch.full((2, *SPACE), 1e20))
    found = task(1e10, residual=False).evaluation_step({"fields": x})
    total, count = found["finite_rollouts"]
    assert (total.item(), count) == (3.0, 4)
    assert found["rollout_relative_l2"][0] == torch.inf


def test_masked_samples_do_not_count():
    x = fields(samples=4)
    mask = torch.tensor([True, False, True, False])
    x[1] = torch.nan
    built = task(rollout_steps=2)
    total, count, _ = built.loss_terms({"fields": x, "mask": mask})
    expected, full, _ = built.loss_terms({"fields": x[mask]})
    assert int(count) == full == 4
    torch.testing.assert_close(total, expected)
    masked, kept = (
        means(built.evaluation_step({"fields": x, "mask": mask})),
        means(built.evaluation_step({"fields": x[mask]})),
    )
    assert masked.keys() == kept.keys()
    assert all(masked[name] == pytest.approx(kept[name], rel=1e-5) for name in kept)


def test_example_for_the_report():
    x = fields(frames=4)
    found = task(0.5, residual=False).evaluation_example({"fields": x})
    assert {name: tuple(value.shape) for name, value in found.items()} == dict.fromkeys(
        ("truth", "prediction", "error"), (3, 2, *SPACE)
    )
    torch.testing.assert_close(found["prediction"][1], physical(0.25 * normalised(x[0, 0])))
    torch.testing.assert_close(found["error"], found["prediction"] - x[0, 1:])


def test_an_example_batch_runs_on_the_meta_device():
    with torch.device("meta"):
        network = FNO(FNOConfig(in_channels=4, out_channels=2, width=8, modes=[4, 4], depth=1))
    built = task(network=network, bind=False, input_frames=2, rollout_steps=3)
    batch = built.example_batch(5)
    assert batch["fields"].shape == (5, 5, 2, *SPACE) and batch["fields"].is_meta
    assert batch["index"].dtype == torch.int64
    assert built.loss_terms(batch)[0].is_meta
    assert built.evaluation_window() == {"frames": 22} and built.tokens_per_sample() == 1


def test_statistics_travel_with_the_state():
    saved = task().state_dict()
    fresh = task(bind=False)
    fresh.load_state_dict(saved)
    assert fresh.mean.tolist() == SPEC["mean"] and fresh.std.tolist() == SPEC["std"]


def test_predictions_under_autocast_stay_in_float32():
    built = task(network=FNO(FNOConfig(in_channels=2, out_channels=2, width=8, modes=[4, 4], depth=1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _, _ = built.loss_terms({"fields": fields()})
    assert total.dtype == torch.float32 and math.isfinite(total.item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "text"}, "takes fields, but the data set holds text"),
        ({"channels": ["u"]}, "task.channels=2: the data set has 1"),
        ({"space": [8, 8]}, r"task.space=\[8, 6\]: the data set has \[8, 8\]"),
        ({"std": [1.0, 0.0]}, r"std=\[1.0, 0.0\]: a constant channel"),
        ({"mean": [1.0, float("nan")]}, "one finite number per channel"),
    ],
)
def test_data_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        task(bind=False).bind(SPEC | changes)


def test_networks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"network.in_channels=2: task.input_frames=3"):
        task(input_frames=3)
    with pytest.raises(ValueError, match=r"network.dimensions=2"):
        task(space=[8])
    with pytest.raises(ValueError, match="is no field network"):
        task(network=nn.Identity())
    with pytest.raises(ValueError, match=r"task.space=\[8, 6\]: the network needs at least \[8, 8\] points"):
        task(network=FNO(FNOConfig(in_channels=2, out_channels=2, modes=[8, 8])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_steps": 0}, "rollout_steps=0: must be at least 1"),
        ({"loss": "l1"}, "loss=l1: choose one of relative_l2, mse"),
        ({"space": []}, r"space=\[\]: give the number"),
        ({"rollout_steps": 3, "eval_rollout_steps": 2}, "eval_rollout_steps=2: below rollout_steps=3"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        FieldRolloutConfig(**changes)


def test_batches_that_do_not_fit():
    with pytest.raises(ValueError, match=r"need \(batch, frames >= 4"):
        task(rollout_steps=3).loss_terms({"fields": fields(frames=3)})
    with pytest.raises(ValueError, match=r"mask of shape \(2,\): one entry per sample"):
        task().loss_terms({"fields": fields(), "mask": torch.ones(2)})
