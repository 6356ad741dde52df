import dataclasses

import pytest
import torch

from modules.registry import lookup, names
from modules.roles import roles


def test_names_are_sorted_and_complete():
    assert names("model") == ["fno", "transformer"]
    assert names("task") == ["field_rollout", "next_token"]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("model", "task") for name in names(kind)])
def test_every_line_leads_to_a_class_with_a_config(kind, name):
    config_class, cls = lookup(kind, name)
    assert dataclasses.is_dataclass(config_class)
    assert cls.config_class is config_class
    config_class()  # defaults are a valid configuration


@pytest.mark.parametrize("name", names("model"))
def test_every_network_keeps_the_contract(name):
    config_class, cls = lookup("model", name)
    network = cls(config_class())
    assert set(roles(network)) == {path for path, _ in network.named_parameters()}
    blocks = network.blocks()
    assert blocks and len({type(block) for block in blocks}) == 1
    assert not any(buffer for buffer in network.buffers())  # nothing to restore after a build on the meta device


@pytest.mark.parametrize("name", names("model"))
def test_initial_weights_follow_from_the_seed_and_can_be_drawn_again(name):
    config_class, cls = lookup("model", name)

    def draw(seed):
        torch.manual_seed(seed)
        return cls(config_class()).state_dict()

    one, same, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)

    with torch.device("meta"):
        network = cls(config_class())
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        parameter.detach().fill_(torch.nan)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"model.name=transfomer: no such model; did you mean transformer"):
        lookup("model", "transfomer")
    with pytest.raises(ValueError, match=r"known: field_rollout, next_token"):
        lookup("task", "zzz")
    with pytest.raises(ValueError, match="kind=optimiser"):
        lookup("optimiser", "adam")
