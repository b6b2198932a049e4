"""torch's recurrent layers as one operator of a compiled graph, with torch's CPU operators in cuDNN's place."""

import threading

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import seqaccel
from seqaccel.functional.rnn import _layers, _torch

CELLS = ["rnn_relu", "rnn_tanh", "lstm", "gru"]  # by cuDNN's numbers


def run(input, weights, weight_stride0, hx, cx, mode, num_layers, bidirectional):
    state = hx if cx is None else (hx, cx)
    has_biases = weight_stride0 > 3
    return getattr(torch._VF, CELLS[mode])(
        input, state, weights, has_biases, num_layers, 0.0, False, bidirectional, False
    )


def forward(
    input, weight, weight_stride0, weight_buf, hx, cx, mode, hidden_size, proj_size, num_layers, batch_first, dropout,
    train, bidirectional, batch_sizes, dropout_state,
):  # fmt: skip
    assert hx.is_contiguous() and not batch_first and not dropout and not batch_sizes and dropout_state is None
    assert (proj_size or hidden_size) == hx.shape[2] and hidden_size == (hx if cx is None else cx).shape[2]
    output, h_n, *c_n = run(input, weight, weight_stride0, hx, cx, mode, num_layers, bidirectional)
    packed = torch.cat([w.flatten() for w in weight])
    reserve = (
        torch.full((packed.numel() % 7 + 3,), 5, dtype=torch.uint8) if train else torch.empty(0, dtype=torch.uint8)
    )
    return output, h_n, c_n[0] if c_n else torch.empty(0), reserve, packed


def backward(
    input, weight, weight_stride0, weight_buf, hx, cx, output, grad_output, grad_hy, grad_cy, mode, hidden_size,
    proj_size, num_layers, batch_first, dropout, train, bidirectional, batch_sizes, dropout_state, reserve, output_mask,
):  # fmt: skip
    assert train and (reserve == 5).all() and torch.equal(weight_buf, torch.cat([w.flatten() for w in weight]))
    reserve.zero_()
    found = []

    def differentiate():  # in a thread of its own: here autograd is off
        inputs = [t.detach().clone().requires_grad_() for t in (input, hx, *([] if cx is None else [cx]), *weight)]
        x, h, *rest = inputs
        c = None if cx is None else rest.pop(0)
        outputs = run(x, rest, weight_stride0, h, c, mode, num_layers, bidirectional)
        pairs = [(o, g) for o, g in zip(outputs, (grad_output, grad_hy, grad_cy), strict=False) if g is not None]
        outputs, grads = zip(*pairs, strict=True)
        found.extend(torch.autograd.grad(outputs, inputs, grads))

    thread = threading.Thread(target=differentiate)
    thread.start()
    thread.join()
    grad_c = torch.empty(0) if cx is None else found.pop(2)
    return found[0], found[1], grad_c, found[2:]


@pytest.fixture
def cudnn(monkeypatch):
    library = torch.library.Library("aten", "IMPL")
    library.impl("_cudnn_rnn", forward, "CPU")
    library.impl("_cudnn_rnn_backward", backward, "CPU")
    monkeypatch.setattr(_torch, "is_opaque", lambda device, dtype: True)
    monkeypatch.setattr(_layers.backends, "node", lambda *_: None)
    monkeypatch.setattr(_layers, "torch_runs_all_layers", lambda *_: True)
    yield
    library._destroy()
    torch._dynamo.reset()


MODULES = [
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"proj_size": 3, "bias": False}),
    ("LSTM", {"num_layers": 2, "dropout": 1.0}),
    ("GRU", {"batch_first": True}),
    ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
]


@pytest.mark.parametrize(("name", "options"), MODULES, ids=str)
def test_compiled(name, options, cudnn):
    """As torch.nn's own, gradients too, in one graph for two lengths and batches."""
    stock, ours = getattr(torch.nn, name)(4, 5, **options), getattr(seqaccel.nn, name)(4, 5, **options)
    ours.load_state_dict(stock.state_dict())
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=count))
    for shape in ((6, 3, 4), (9, 2, 4)):
        found = []
        for module in (stock, compiled):
            x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
            output, state = module(x)
            loss = output.square().sum() + sum((s * s).sum() for s in (state if isinstance(state, tuple) else (state,)))
            grads = torch.autograd.grad(loss, [x, *(p for p in (stock if module is stock else ours).parameters())])
            found.append([output, *grads])
        for mine, theirs in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(mine, theirs)
    assert any("rnn_cudnn" in str(node.target) for node in graphs[0].graph.nodes)


def test_no_gradient(cudnn):
    ours = seqaccel.nn.GRU(4, 5)
    x = torch.randn(6, 3, 4)
    with torch.no_grad():
        output, h_n = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(output[-1], h_n[0])
