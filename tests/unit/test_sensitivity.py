"""FedML-HE's sensitivity map: against its formula by hand, and against labels that are varied one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedllm.audit.sensitivity import Sensitive, by_tensor, covering, sensitivity
from fedllm.silo.examples import IGNORED, Example


class Bigram(nn.Module):
    """Logits of the next token are a row of a table, times a scale."""

    def __init__(self, table):
        super().__init__()
        self.table, self.scale = nn.Parameter(table), nn.Parameter(torch.ones(1))

    def forward(self, input_ids, use_cache):
        return type("Out", (), {"logits": self.table[input_ids] * self.scale})


def test_by_hand_on_two_tokens():
    # Both rows of the table are 0, so every next token has a chance of 1/2, and a gradient is 1/2 - 1 or 1/2.
    model = Bigram(torch.zeros(2, 2))
    rows = [Example([0, 1, 1], [0, 1, 1])]
    found = sensitivity(model, dict(model.named_parameters()), rows, each=2)
    # Token 1 after 0 moves row 0 by (1/2, -1/2); token 1 after 1 moves row 1 alike; each is one of two tokens.
    assert torch.equal(found["table"], torch.full((2, 2), 0.25))
    assert torch.equal(found["scale"], torch.zeros(1))


def test_it_is_the_derivative_of_the_gradient_by_the_own_label_of_each_token():
    torch.manual_seed(0)
    model = Bigram(torch.randn(5, 5))
    row = Example([3, 1, 4, 1, 2], [IGNORED, 1, 4, IGNORED, 2])
    found = sensitivity(model, dict(model.named_parameters()), [row], each=9)
    values, expected = list(model.parameters()), None
    ids = torch.tensor(row.input_ids)
    for place in (1, 2, 4):
        label_V = torch.zeros(5).index_fill(0, ids[place], 1.0).requires_grad_()
        logits_V = model(ids[None], use_cache=False).logits[0, place - 1]
        gradients = torch.autograd.grad(-(label_V * logits_V.log_softmax(0)).sum(), values, create_graph=True)
        flat = torch.cat([each.flatten() for each in gradients])
        jacobian = torch.stack([torch.autograd.grad(each, label_V, retain_graph=True)[0][ids[place]] for each in flat])
        expected = jacobian.abs() / 3 + (0 if expected is None else expected)
    assert torch.allclose(torch.cat([found["table"].flatten(), found["scale"]]), expected, atol=1e-6)


def test_shares_add_up_and_the_first_tensors_cover_what_was_asked():
    each = by_tensor({"a": torch.tensor([1.0]), "b": torch.tensor([3.0, 3.0]), "c": torch.zeros(7)})
    assert each == [Sensitive("b", 0.2, 6 / 7), Sensitive("a", 0.1, pytest.approx(1 / 7)), Sensitive("c", 0.7, 0.0)]
    assert [tensor.name for tensor in covering(each, 0.1)] == ["b"]
    assert [tensor.name for tensor in covering(each, 0.3)] == ["b", "a"]
    assert len(covering(each, 1.0)) == 3
    assert by_tensor({"a": torch.zeros(2)}) == [Sensitive("a", 1.0, 0.0)]


def test_no_more_tokens_of_a_row_are_asked_than_said_and_a_row_without_any_tells_nothing():
    model, asked = Bigram(torch.zeros(3, 3)), []
    model.table.register_hook(asked.append)
    silent = Example([1, 2], [IGNORED, IGNORED])
    found = sensitivity(model, {"table": model.table}, [silent, Example([0] * 9, [0] * 9)], each=3)
    assert len(asked) == 3 and float(found["table"][0].sum()) == pytest.approx(4 / 3)
