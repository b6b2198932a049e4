"""Swapping the layers of an existing model."""

import torch

import seqaccel


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.LSTM(6, 10, num_layers=2, bidirectional=True)
        self.head = torch.nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.encoder(x)[0])


class OwnLSTM(torch.nn.LSTM):
    pass


def test_the_converted_model_computes_the_same_with_the_same_parameters():
    model, x = Tagger(), torch.randn(7, 2, 6)
    expected, parameters, keys = model(x), list(model.parameters()), list(model.state_dict())
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    assert seqaccel.convert(model) is model
    assert type(model.encoder) is seqaccel.nn.LSTM
    assert [*map(id, model.parameters())] == [*map(id, parameters)] and list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]
    model(x).sum().backward()
    optimiser.step()
    restored = Tagger()
    restored.load_state_dict(model.state_dict())
    torch.testing.assert_close(restored(x), model(x))


def test_subclasses_are_left_alone():
    assert type(seqaccel.convert(torch.nn.Sequential(OwnLSTM(2, 3)))[0]) is OwnLSTM
