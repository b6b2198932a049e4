"""What a newcomer's first minute uses, on the C++ backend: run by CI against the installed wheel, outside the tree."""

import pathlib
import sys

import torch

import seqaccel.info
import seqaccel.nn as snn


def check(name: str, output: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    grads = torch.autograd.grad(output.square().sum(), inputs)
    assert output.isfinite().all() and all(g.isfinite().all() and g.abs().sum() > 0 for g in grads), name
    print(f"{name}: {tuple(output.shape)}")


def main() -> None:
    torch.manual_seed(0)
    print(seqaccel.info.report())
    assert seqaccel.backends.why_missing("cpp", "cpu") is None
    x = torch.randn(7, 2, 64, requires_grad=True)  # [T, B, C]
    with seqaccel.backend("cpp"):
        lstm, sru = snn.LSTM(64, 32), snn.SRU(64, 64)
        tcn, attention = snn.TCN(64, [32, 32]), snn.HierarchicalAttention(64, 2, batch_first=True)
        check("LSTM", lstm(x)[0], [x, *lstm.parameters()])
        check("linear_scan", seqaccel.functional.linear_scan(x.sigmoid(), x, dim=0), [x])
        check("SRU", sru(x)[0], [x])
        check("TCN", tcn.eval()(x.permute(1, 2, 0)), [x])
        y = x.transpose(0, 1)
        check("HierarchicalAttention", attention(y, y, y)[0], [x])
        for module, inputs in ((lstm, x), (sru, x), (tcn, x), (attention, x)):
            state = module.init_state(2)
            y_t, state = module.step(inputs[0], state)
            assert y_t.isfinite().all()
    stock = torch.nn.LSTM(64, 32)
    stock.load_state_dict(lstm.state_dict())
    expected = stock(x)[0].detach()
    torch.testing.assert_close(lstm(x)[0].detach(), expected)
    torch.testing.assert_close(seqaccel.Session(lstm, batch_size=2).extend(x.detach()), expected)
    assert isinstance(seqaccel.convert(stock), snn.LSTM) and isinstance(stock, torch.nn.LSTM)


if __name__ == "__main__":
    main()
    here = pathlib.Path(seqaccel.__file__)
    assert (here.parent / "py.typed").exists()
    sys.exit(0 if "site-packages" in here.parts else f"smoke test ran against {here}, not an installed wheel")
