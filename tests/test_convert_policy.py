"""``convert`` and ``optimize`` on a policy of sb3-contrib, whose class calls its LSTM step by step."""

import pytest
import torch

import seqaccel
from seqaccel.convert import measure


class RecurrentActorCriticPolicy(torch.nn.Module):
    """What sb3-contrib's policy does with its LSTM: a call a step where episodes begin."""

    __module__ = "sb3_contrib.common.recurrent.policies"

    def __init__(self, **options):
        super().__init__()
        self.lstm_actor = torch.nn.LSTM(3, 4, **options)

    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        n_seq = lstm_states[0].shape[1]
        sequence = features.reshape((n_seq, -1, lstm.input_size)).swapaxes(0, 1)
        outputs = []
        for x, start in zip(sequence, episode_starts.reshape((n_seq, -1)).swapaxes(0, 1), strict=True):
            states = tuple((1.0 - start).view(1, n_seq, 1) * state for state in lstm_states)
            output, lstm_states = lstm(x.unsqueeze(0), states)
            outputs.append(output)
        return torch.cat(outputs).transpose(0, 1).flatten(0, 1), lstm_states

    def forward(self, features, h, c, starts):
        output, states = self._process_sequence(features, (h, c), starts, self.lstm_actor)
        return output, *states


def test_sb3_contrib():
    policy, starts = RecurrentActorCriticPolicy(num_layers=2), (torch.rand(3 * 7) < 0.3).float()
    inputs = torch.randn(3 * 7, 3), torch.randn(2, 3, 4), torch.randn(2, 3, 4), starts
    expected = policy(*inputs)
    gradient = torch.autograd.grad(expected[0].sum(), policy.lstm_actor.weight_hh_l0)
    converted, report = seqaccel.convert(policy, report=True)
    assert [row.target for row in report] == ["its episodes in one call", "seqaccel.nn.LSTM"]
    found = converted(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found[0].sum(), policy.lstm_actor.weight_hh_l0), gradient)
    seqaccel.convert(policy, {"LSTM": False})
    torch.testing.assert_close(policy(*inputs), expected)
    assert type(seqaccel.revert(policy)) is RecurrentActorCriticPolicy
    derived = type("Own", (RecurrentActorCriticPolicy,), {"_process_sequence": lambda self, *_: None})()
    assert seqaccel.convert(derived, report=True)[1].rows[0].reason == "its own _process_sequence"


@pytest.mark.parametrize("together", [True, False])
def test_a_policy_is_optimized_with_its_lstm(monkeypatch, together):
    """Its class gains nothing without the LSTM's, whatever the LSTM gains alone; ``call`` runs the sequence."""
    policy, replaced = RecurrentActorCriticPolicy(), []

    def compared(run, devices, use_ours):
        use_ours(True)
        layers = type(policy) is not RecurrentActorCriticPolicy, isinstance(policy.lstm_actor, seqaccel.nn.LSTM)
        use_ours(False)
        replaced.append((run.args[-1].function, layers))
        return (3.0, 1.0) if together and all(layers) else (1.0, 2.0)

    monkeypatch.setattr(measure, "_compared", compared)
    step = torch.randn(1, 3), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1)
    evaluate = lambda *inputs: policy(*inputs)[0].mean()  # noqa: E731
    report = seqaccel.optimize(policy, step, call=evaluate, progress=False)
    assert [row.path for row in report] == ["", "lstm_actor", "(model)"][: 2 + together]
    assert all(row.faster is together for row in report)
    assert replaced[0] == (evaluate, (True, True)) and isinstance(policy.lstm_actor, seqaccel.nn.LSTM) is together
    assert (report.rows[1].training == report.rows[1].training) is not together  # the policy's row decides for it
    alone = (policy.lstm_actor, (False, True))
    assert (alone in replaced) is not together
    replaced.clear()
    rows = list(seqaccel.benchmark(policy, step, progress=False))
    assert [row.path for row in rows] == ["", "lstm_actor", "(model)"] and alone in replaced
    assert replaced[0] == (policy, (True, True)) and isinstance(policy.lstm_actor, seqaccel.nn.LSTM) is together
