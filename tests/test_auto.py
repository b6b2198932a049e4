"""What auto takes: on a GPU by what an H100 measured (no GPU is needed to ask), on a CPU where torch is faster."""

import pathlib
import shutil
import subprocess
import sysconfig
import types

import pytest
import torch

import seqaccel
from seqaccel import _extension, backends
from seqaccel.functional.attention import block_sparse, hierarchical
from seqaccel.functional.conv import _equivalents as conv
from seqaccel.functional.rnn import _layers
from seqaccel.functional.rnn._cells import Problem


def on_a_gpu(dtype):
    return types.SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True, dtype=dtype)


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = types.SimpleNamespace(shared_memory_per_block_optin=227 << 10, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(_extension, "triton_build_error", lambda: None)
    monkeypatch.setattr(_extension, "cuda_error", None)
    monkeypatch.setattr(_extension, "cuda_device_error", lambda index: None)
    return properties


BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("cell", "dtype", "hidden", "zoned", "expected"),
    [
        ("lstm", BFLOAT16, 64, False, "triton"),
        ("gru", BFLOAT16, 128, False, "triton"),
        ("lstm", BFLOAT16, 100, False, "torch"),
        ("lstm", BFLOAT16, 130, False, "torch"),
        ("rnn_tanh", BFLOAT16, 256, False, "triton"),
        ("rnn_tanh", torch.float16, 256, False, "torch"),
        ("gru", torch.float16, 1024, False, "triton"),
        ("lstm", torch.float16, 512, False, "torch"),
        ("lstm", FLOAT32, 512, False, "triton"),
        ("lstm", FLOAT32, 1024, False, "torch"),
        ("lstm", BFLOAT16, 2048, False, "torch"),
        ("lstm", FLOAT32, 64, False, "torch"),
        ("gru", torch.float16, 64, False, "torch"),
        ("lstm", FLOAT64, 64, False, "torch"),
        ("lstm", FLOAT32, 256, True, "triton"),
        ("lstm", FLOAT64, 256, True, "reference"),
        ("layer_norm_lstm", FLOAT32, 256, False, "triton"),
        ("layer_norm_lstm", FLOAT64, 256, False, "reference"),
    ],
)
def test_auto_on_a_gpu(cell, dtype, hidden, zoned, expected, h100):
    tensor = on_a_gpu(dtype)
    problem = Problem(tensor.device, 100, 4, hidden, hidden, dtype, False, True, False)
    assert _layers.choose(cell, tensor, problem, zoned) == expected


@pytest.mark.parametrize(("batch", "expected"), [(16, True), (64, False), (300, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_torch_runs_all_layers_as_auto_would(packed, batch, expected, h100):
    """What a module asks before its layers do: it sees the batch, packed or not."""
    shape, sizes = ((40, batch, 8), None) if not packed else ((40 * batch, 8), torch.tensor([batch] * 40))
    input = types.SimpleNamespace(**vars(on_a_gpu(torch.float16)), shape=shape)
    assert _layers.torch_runs_all_layers("lstm", input, sizes, 512, False) == expected


def test_auto_on_a_small_or_an_old_gpu(h100, monkeypatch):
    tensor = on_a_gpu(BFLOAT16)

    def choice(cell, hidden, projected=False, batch=4, steps=100):
        problem = Problem(tensor.device, steps, batch, hidden, hidden, BFLOAT16, False, True, projected)
        return _layers.choose(cell, tensor, problem, False)

    assert choice("lstm", 64) == "triton" and choice("lstm", 64, projected=True) == "torch"  # that runs step by step
    assert choice("lstm", 512) == "triton" and choice("lstm", 512, batch=256) == "triton"
    assert choice("lstm", 512, batch=300) == "torch"  # that takes three launches
    assert choice("lstm", 512, steps=16) == "torch" and choice("lstm", 512, steps=32) == "triton"
    assert choice("rnn_tanh", 2048) == "torch"  # not measured
    assert choice("peephole_lstm", 512, batch=300) == "triton"
    for memory, processors in ((163, 108), (99, 58)):
        h100.shared_memory_per_block_optin, h100.multi_processor_count = memory << 10, processors
        assert choice("lstm", 64) == "triton" and choice("lstm", 256) == choice("lstm", 512) == "torch"
        assert choice("lstm", 128, batch=1024) == ("triton" if memory > 160 else "torch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choice("lstm", 64) == "torch" and choice("peephole_lstm", 64) == "reference"


def test_sizes_that_auto_keeps_from_triton():

    def empty(*shape, dtype=BFLOAT16):
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = empty(256, 256, 3)
    assert not conv.torch_is_faster(empty(32, 256, 4096), weight, 16, 1)
    assert not conv.torch_is_faster(empty(16, 2048, 2048), empty(2048, 1, 4), 1, 2048)
    for x, groups in ((empty(16, 256, 1024), 1), (empty(32, 256, 4096), 4), (empty(70000, 256, 32), 1)):
        assert conv.torch_is_faster(x, weight, 16, groups)
    assert conv.torch_is_faster(empty(1, 1024, 2**21 + 64), empty(1024, 1024, 3), 1, 1)
    assert conv.torch_is_faster(empty(32, 256, 4096, dtype=FLOAT64), weight, 16, 1)
    # The gradient's launch has no room for so many strips of time, or taps of groups, though the forward's has.
    assert conv.torch_is_faster(empty(1, 16, 65535 * 1024), empty(16, 16, 3), 1, 1)
    assert conv.torch_is_faster(empty(1, 65534, 64), empty(65534, 2, 3), 1, 32767)
    assert hierarchical._triton_takes(*[empty(16, 8, 4096, 64)] * 3)
    assert block_sparse._triton_takes(*[empty(16, 8, 4096, 64)] * 2)
    for query in (empty(1, 1, 8, 512), empty(8192, 16, 8, 8), empty(1, 1, 2**26, 32), empty(1, 1, 8, 8, dtype=FLOAT64)):
        assert not hierarchical._triton_takes(query, query, query) and not block_sparse._triton_takes(query, query)
    packed, offsets = empty(1, 8, 4096, 64), torch.empty(3, dtype=torch.int64, device="meta")
    assert not hierarchical._triton_takes(packed, packed, packed, offsets)
    assert not hierarchical._triton_takes(packed, packed, packed, None, 0.1)


@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16_convolutions_that_auto_leaves_to_torch(amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    def backend(batch, channels, outputs, steps, taps=3, groups=1, dtype=BFLOAT16, training=False):
        x = torch.randn(batch, channels, steps, dtype=dtype)
        weight = torch.randn(outputs, channels // groups, taps, dtype=dtype, requires_grad=training)
        with torch.profiler.profile() as profile:
            seqaccel.functional.causal_conv1d(x, weight, groups=groups)
        names = {event.key for event in profile.key_averages()}
        assert ("aten::conv1d" in names) != ("seqaccel::causal_conv1d_forward" in names)
        return "torch" if "aten::conv1d" in names else "cpp"

    pairs = torch.ops.seqaccel.isa() == "avx512_bf16"
    torch_where = {True: "torch", False: "cpp"}
    assert backend(4, 256, 256, 512) == torch_where[pairs]
    assert backend(2, 384, 384, 384, taps=2) == torch_where[pairs]
    assert backend(2, 384, 384, 384, taps=2, training=True) == torch_where[pairs]
    assert backend(1, 1024, 512, 64, training=True) == torch_where[pairs]
    for few in ((4, 256, 256, 256), (4, 128, 128, 512)):
        assert backend(*few) == torch_where[pairs and amx]
        assert backend(*few, training=True) == torch_where[pairs and amx]
    assert backend(4, 32, 256, 512) == backend(4, 256, 256, 512, groups=2) == "cpp"
    assert backend(4, 256, 256, 512, dtype=FLOAT32) == backend(4, 256, 256, 512, dtype=FLOAT16) == "cpp"


@pytest.mark.parametrize("amx", [False, True])
def test_convolutions_of_a_grid_that_auto_leaves_to_torch(amx, monkeypatch):
    monkeypatch.setattr(backends, "torch_has_amx", lambda: amx)

    def backend(batch, inputs, outputs, steps, width, taps=(3, 3), groups=1, dtype=FLOAT32, training=False, **options):
        x = torch.randn(batch, inputs, steps, width, dtype=dtype)
        weight = torch.randn(outputs, inputs // groups, *taps, dtype=dtype) / (inputs * taps[0] * taps[1]) ** 0.5
        weight.requires_grad_(training)
        with torch.profiler.profile() as profile:
            y = seqaccel.functional.causal_conv2d(x, weight, groups=groups, **options)
        names = {event.key for event in profile.key_averages()}
        assert ("aten::conv2d" in names) != ("seqaccel::causal_conv2d_forward" in names)
        if "aten::conv2d" in names:
            with backends.backend("cpp"):
                expected = seqaccel.functional.causal_conv2d(x, weight, groups=groups, **options)
            bound = 1e-5 if dtype is FLOAT32 else 2e-2
            torch.testing.assert_close(y, expected, rtol=bound, atol=bound)
        return "torch" if "aten::conv2d" in names else "cpp"

    isa = torch.ops.seqaccel.isa()
    wide, narrow = ({True: "torch", False: "cpp"}[isa in isas] for isas in (("avx512", "avx512_bf16"), ("avx2",)))
    either = "torch" if "torch" in (wide, narrow) else "cpp"
    assert backend(1, 64, 64, 16, 40) == backend(1, 64, 64, 16, 40, activation="gated") == either
    assert backend(1, 64, 64, 16, 40, training=True) == either
    assert backend(1, 32, 32, 16, 40, training=True) == narrow
    assert backend(1, 32, 32, 16, 40, (5, 3), training=True) == backend(1, 64, 16, 16, 40, (5, 3)) == either
    assert backend(1, 48, 48, 16, 40) == backend(1, 64, 64, 16, 40, (2, 3)) == backend(1, 16, 64, 16, 40) == narrow
    assert backend(1, 48, 48, 16, 10) == backend(1, 16, 16, 16, 10, (2, 3)) == either
    assert backend(1, 64, 64, 1, 64, (2, 3)) == either
    for kept in ({"reset": torch.zeros(1, 16, dtype=torch.bool)}, {"dropout": 0.1}, {"groups": 2}, {"taps": (3, 1)}):
        assert backend(1, 64, 64, 16, 40, **kept) == "cpp"
    torch_with_amx = "torch" if amx else "cpp"
    assert backend(1, 16, 16, 64, 64, dtype=BFLOAT16) == backend(2, 48, 1, 16, 40, dtype=BFLOAT16) == torch_with_amx
    assert backend(2, 1, 32, 64, 64, dtype=BFLOAT16, training=True) == torch_with_amx
    assert backend(2, 1, 32, 64, 64, dtype=BFLOAT16) == backend(1, 32, 32, 16, 20, dtype=BFLOAT16) == "cpp"
    assert backend(1, 64, 64, 16, 40, dtype=FLOAT64) == "cpp"


@pytest.mark.parametrize("amx", [False, True])
def test_wavenet_layers_that_auto_leaves_to_torch(amx, monkeypatch):
    monkeypatch.setattr(backends, "torch_has_amx", lambda: amx)

    def backend(channels, dtype=BFLOAT16, **options):
        x = torch.randn(2, channels, 70, dtype=dtype)
        weights = torch.randn(2 * channels, channels, 2, dtype=dtype), torch.randn(channels, channels, 1, dtype=dtype)
        with torch.profiler.profile() as profile:
            seqaccel.functional.wavenet_layer(x, weights[0] / 16, None, weights[1], None, residual=False, **options)
        return "torch" if any(event.key == "aten::conv1d" for event in profile.key_averages()) else "cpp"

    assert backend(256) == ("torch" if amx and torch.ops.seqaccel.isa() == "avx512_bf16" else "cpp")
    assert backend(128) == backend(256, FLOAT32) == backend(256, reset=torch.zeros(2, 70, dtype=torch.bool)) == "cpp"


@pytest.mark.parametrize("amx", [False, True])
def test_convolutional_grus_that_auto_leaves_to_torch(amx, monkeypatch):
    monkeypatch.setattr(backends, "torch_has_amx", lambda: amx)

    def backend(batch, channels, dtype=BFLOAT16):
        x = torch.randn(batch, channels, 4, 32, dtype=dtype)
        weights = torch.randn(3 * channels, channels, 3, 3, dtype=dtype) / (3 * channels**0.5)
        with torch.profiler.profile() as profile:
            seqaccel.functional.convolutional_gru(x, weights[: 2 * channels], None, weights[2 * channels :])
        return "torch" if any(event.key == "aten::conv2d" for event in profile.key_averages()) else "cpp"

    assert backend(8, 64) == ("torch" if amx else "cpp")
    assert backend(4, 64) == backend(16, 32) == backend(8, 64, FLOAT32) == "cpp"


@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16_layers_that_auto_leaves_to_torch(amx, monkeypatch):
    monkeypatch.setattr(backends, "torch_has_amx", lambda: amx)

    def choice(cell, batch, hidden, training=False, dtype=BFLOAT16, ragged=False, projected=False, **options):
        input = torch.empty(1, dtype=dtype)
        problem = Problem(input.device, 128, batch, hidden, hidden, dtype, ragged, training, projected)
        return _layers.choose(cell, input, problem, options.get("zoned", False), options.get("has_reset", False))

    torch_with_amx = "torch" if amx else "cpp"
    for batch, hidden in ((4, 192), (8, 128), (16, 96), (64, 64), (1, 512), (3, 320)):
        assert choice("lstm", batch, hidden) == torch_with_amx
    for batch, hidden in ((4, 128), (16, 64), (1, 256), (2, 512), (1, 1024)):
        assert choice("lstm", batch, hidden) == "cpp"
    for training in (False, True):
        for cell in ("gru", "rnn_tanh", "rnn_relu"):
            assert choice(cell, 64, 512, training) == choice(cell, 256, 256, training) == torch_with_amx
            assert choice(cell, 16, 256, training) == choice(cell, 1024, 128, training) == "cpp"
    assert choice("gru", 32, 512) == torch_with_amx and choice("gru", 32, 512, True) == "cpp"
    for kept in ("ragged", "projected", "zoned", "has_reset"):  # torch's operators take none of these, or slowly
        assert choice("lstm", 64, 512, **{kept: True}) == choice("lstm", 64, 512, True, **{kept: True}) == "cpp"
    assert choice("lstm", 1, 64, True) == "torch"
    assert choice("lstm", 64, 512, dtype=FLOAT32) == choice("lstm", 64, 512, dtype=FLOAT16) == "cpp"
    assert choice("peephole_lstm", 64, 512) == choice("gru_reset_before", 64, 512) == "cpp"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choice("lstm", 64, 512) == "cpp"


@pytest.mark.parametrize(("kind", "batch", "hidden"), [("LSTM", 5, 161), ("GRU", 35, 481), ("RNN", 65, 513)])
def test_results_of_what_auto_leaves_to_torch(kind, batch, hidden, monkeypatch):
    """Layers, directions, states and chunks, of an input with gaps, as our kernels have them; and the lengths that they
    keep."""
    monkeypatch.setattr(backends, "torch_has_amx", lambda: True)
    torch.manual_seed(0)
    module = getattr(seqaccel.nn, kind)(9, hidden, num_layers=2, bidirectional=True).bfloat16()
    x = torch.randn(batch, 4, 18).bfloat16()[..., ::2].transpose(0, 1)
    state = torch.randn(4, batch, hidden).bfloat16()
    state = (state, torch.randn_like(state)) if kind == "LSTM" else state
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.arange(batch) % 4 + 1, enforce_sorted=False)
    causal = getattr(seqaccel.nn, kind)(9, hidden).bfloat16()

    def results():
        with torch.no_grad():
            first, carried = causal.extend(x[:2], causal.init_state(batch))
            last, carried = causal.extend(x[2:3], carried)
            return module(x, state), module(packed)[0].data, first, last, causal.step(x[3], carried)

    with torch.profiler.profile() as profile:
        found = results()
    assert any(event.key in ("aten::lstm", "aten::gru", "aten::rnn_tanh") for event in profile.key_averages())
    with backends.backend("cpp"):
        torch.testing.assert_close(found, results(), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("prefer", [None, "cuda", "triton"])
@pytest.mark.parametrize("operator", backends.VERIFIED)
def test_gpus_that_auto_keeps_from_our_kernels(operator, prefer, h100, monkeypatch):
    """Whatever is preferred: old GPUs, AMD's, and what cannot be built or loaded here."""
    tensor = on_a_gpu(FLOAT32)

    def choice():
        return backends.choose(operator, tensor, ("reference", "cpp", "triton", "cuda"), prefer=prefer)

    verified = backends.VERIFIED[operator]
    assert choice() == (prefer if prefer in verified else (*verified, "reference")[0])
    with monkeypatch.context() as without:
        without.setattr(_extension, "cuda_device_error", lambda index: "no kernel image is available")
        assert choice() == ("triton" if "triton" in verified else "reference")
        without.setattr(_extension, "triton_build_error", lambda: "no C compiler")
        assert choice() == "reference"
    with monkeypatch.context() as amd:
        amd.setattr(torch.version, "hip", "6.4")
        assert choice() == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choice() == "reference"
    with backends.backend("triton"):
        assert choice() == "triton"  # who asks for it gets it, or its error


def test_what_triton_builds_with(monkeypatch, tmp_path):
    error = _extension.triton_build_error.__wrapped__
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert "Python.h" in error()
    (tmp_path / "Python.h").touch()
    assert error() is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C compiler" in error()
    monkeypatch.setenv("CC", "cc")
    assert error() is None


@pytest.mark.skipif(shutil.which("nvcc") is None or torch.cuda.is_available(), reason="asks nvcc, without a GPU")
def test_what_cuda_says_of_a_gpu_that_is_not_there(monkeypatch, tmp_path):
    source = pathlib.Path(__file__).parent.parent / "csrc/cuda/device.cu"
    library = tmp_path / "_cuda.so"
    subprocess.run(["nvcc", "-shared", "-Xcompiler", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(_extension, "_find", lambda name: library)
    assert "CUDA" in _extension.cuda_device_error.__wrapped__(0)


def test_precision_of_products(monkeypatch):
    launch = pytest.importorskip("seqaccel.kernels._launch")
    allowed, forbidden = (types.SimpleNamespace(fp32_precision=p) for p in ("tf32", "ieee"))
    assert launch.precision(FLOAT32, allowed) == "tf32"
    assert launch.precision(BFLOAT16, allowed) == launch.precision(FLOAT32, forbidden) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch.precision(FLOAT32, allowed) == "ieee"


@pytest.mark.parametrize("hidden", [64, 100, 130, 512, 1024])
@pytest.mark.parametrize("dtype", [FLOAT32, torch.float16, BFLOAT16, FLOAT64], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_compiling_changes_no_choice_on_a_gpu(cell, dtype, hidden, h100, monkeypatch):
    """torch's operator is one of the graph then; but lengths, and GPUs without cuDNN, would unroll its steps."""
    tensor = on_a_gpu(dtype)

    def choice(ragged=False):
        problem = Problem(tensor.device, 100, 4, hidden, hidden, dtype, ragged, True, False)
        return _layers.choose(cell, tensor, problem, False)

    eager = choice()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choice() == eager
    if dtype != FLOAT64:
        assert choice(ragged=True) == "triton"
        with monkeypatch.context() as exporting:
            exporting.setattr(torch.compiler, "is_exporting", lambda: True)
            assert choice() == "triton"
        monkeypatch.setattr(torch._C, "_get_cudnn_enabled", lambda: False)
        monkeypatch.setattr(torch.backends.cudnn.__class__, "enabled", False)
        assert choice() == "triton"


@pytest.mark.parametrize(("dtype", "expected"), [(BFLOAT16, "triton"), (torch.float16, "torch")], ids=str)
def test_the_choice_can_be_traced(dtype, expected, h100, monkeypatch):
    """In one graph, of whatever batch and length: the tiles follow them by comparisons."""
    monkeypatch.setattr(backends, "choose", lambda cell, tensor, supported, prefer: prefer or "triton")
    graphs, found = [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def chosen(x):
        problem = Problem(torch.device("cuda", 0), x.shape[0], x.shape[1], 8, 512, dtype, False, True, False)
        return x + 1, _layers.choose("lstm", x, problem, False)

    compiled = torch.compile(chosen, fullgraph=True, dynamic=True, backend=count)
    for steps, batch in ((40, 3), (41, 17), (100, 30)):
        found.append(compiled(torch.zeros(steps, batch))[1])
    torch._dynamo.reset()
    assert found == [expected] * 3 and len(graphs) == 1
