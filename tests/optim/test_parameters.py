import torch
from torch import nn

from megalm.optim.parameters import parameter_groups


def test_groups_keep_the_order_and_leave_out_frozen_parameters():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2), nn.Linear(2, 2))
    model[3].requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, rest = parameter_groups(model.named_parameters(), 0.1, lambda name, parameter: parameter.dim() > 1)
    assert [names[id(p)] for p in decay["params"]] == ["0.weight", "2.weight"]
    assert [names[id(p)] for p in rest["params"]] == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_the_predicate_sees_the_name():
    model = nn.Linear(2, 3)
    decay, rest = parameter_groups(model.named_parameters(), 0.1, lambda name, parameter: name == "bias")
    assert decay["params"][0] is model.bias
    assert rest["params"][0] is model.weight


def test_no_empty_group():
    weight = nn.Parameter(torch.zeros(2, 2))
    assert len(parameter_groups([("weight", weight)], 0.1, lambda name, parameter: True)) == 1
    (group,) = parameter_groups([("weight", weight)], 0.1, lambda name, parameter: False)
    assert group["weight_decay"] == 0.0


def test_a_group_for_each_rate_and_for_the_head():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    groups = parameter_groups(
        model.named_parameters(),
        0.1,
        lambda name, parameter: parameter.dim() > 1,
        lambda name, parameter: 1.0 if name.startswith("2.") else 0.5,
        lambda name, parameter: name.startswith("2."),
    )
    assert [(group["weight_decay"], group["rate_scale"], group["head"], len(group["params"])) for group in groups] == [
        (0.1, 0.5, False, 2),
        (0.1, 1.0, True, 1),
        (0.0, 0.5, False, 2),
        (0.0, 1.0, True, 1),
    ]
