"""Attention beside torch's dense attention, which is the comparison: the two compute different things."""

import functools

import torch
import torch.nn.functional as F
from harness import Case, suite

import seqaccel
from seqaccel.functional import additive_attention, block_sparse_attention, hierarchical_attention, novelty_gate
from seqaccel.nn import AttentionLSTMDecoder

SIZES = {
    "T=2048": dict(B=1, H=4, T=2048, D=64, causal=True),
    "T=8192": dict(B=1, H=4, T=8192, D=64, causal=True),
    "T=8192,bidirectional": dict(B=1, H=4, T=8192, D=64, causal=False),
}
BLOCK, NEAR = 64, 2


@functools.cache
def pairs(T: int, causal: bool) -> int:
    """Pairs of a query and a node that it sees, with BLOCK tokens a block and a fanout of BLOCK."""
    block = torch.arange(T // BLOCK)
    total, span = 0, 1
    while span <= T:
        nodes, above = T // span, span * BLOCK
        cell = block * BLOCK // span
        parent = block * BLOCK // above
        node = torch.arange(nodes)
        orphan = node >= T // above * BLOCK
        seen = ((parent[:, None] - node // BLOCK).abs() < NEAR) | orphan
        if span == 1:
            own = node[None] // BLOCK == block[:, None]
            total += int((seen & ~own & ((node[None] < block[:, None] * BLOCK) | (not causal))).sum()) * BLOCK
            total += T * (BLOCK + 1) // 2 if causal else T * BLOCK
        else:
            seen &= (cell[:, None] - node >= NEAR) if causal else ((cell[:, None] - node).abs() >= NEAR)
            total += int(seen.sum()) * BLOCK
        span = above
    return total


def make_inputs(B, H, T, D, device="cpu", dtype=torch.float32):
    return [torch.randn(B, H, T, D, device=device, dtype=dtype) for _ in range(4)]


def forward_case(B, H, T, D, causal, backend="cpp", device="cpu", dtype=torch.float32):
    q, k, v, _ = make_inputs(B, H, T, D, device, dtype)

    def ours(pool=None):
        with seqaccel.backend(backend), torch.no_grad():
            return hierarchical_attention(q, k, v, pool, causal=causal)

    def dense():
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    size = q.element_size()
    return Case(
        {f"seqaccel[{backend}]": ours, "torch": dense},
        flops=4 * B * H * D * pairs(T, causal),
        bytes=4 * B * H * T * D * size,
        dtype=dtype,
        same=(),
    )


def training_case(B, H, T, D, causal, backend="cpp", device="cpu", dtype=torch.float32):
    *inputs, grad = make_inputs(B, H, T, D, device, dtype)
    leaves = [t.requires_grad_() for t in inputs]

    def ours():
        with seqaccel.backend(backend):
            return torch.autograd.grad(hierarchical_attention(*leaves, causal=causal), leaves, grad)

    def dense():
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=causal), leaves, grad)

    return Case(
        {f"seqaccel[{backend}]": ours, "torch": dense},
        flops=14 * B * H * D * pairs(T, causal),  # two products forward, five backward
        bytes=8 * B * H * T * D * inputs[0].element_size(),
        dtype=dtype,
        same=(),
    )


@suite(SIZES | {"T=32768": dict(B=1, H=4, T=32768, D=64, causal=True)}, ["seqaccel[cpp]", "torch"])
def bench_hierarchical_attention_forward(B, H, T, D, causal):
    return forward_case(B, H, T, D, causal)


@suite({"T=8192": SIZES["T=8192"]}, ["seqaccel[cpp]", "float32", "torch"])
def bench_hierarchical_attention_forward_bfloat16(B, H, T, D, causal):
    """Beside our own float32, and torch's dense attention in bfloat16."""
    case = forward_case(B, H, T, D, causal, dtype=torch.bfloat16)
    case.contenders["float32"] = forward_case(B, H, T, D, causal).contenders["seqaccel[cpp]"]
    return case


@suite(SIZES, ["seqaccel[cpp]", "torch"])
def bench_hierarchical_attention_training(B, H, T, D, causal):
    return training_case(B, H, T, D, causal)


def seen_at(t: int) -> int:
    """Nodes that the query at position t sees."""
    count, span = 0, 1
    while (last := t + 1 if span == 1 else t // span - NEAR + 1) > 0:
        count += last - max(0, (t // (span * BLOCK) - NEAR + 1) * BLOCK)
        span *= BLOCK
    return count


STEPS = {"T=4096": dict(B=1, T=4096), "T=4096,B=16": dict(B=16, T=4096), "T=100000": dict(B=1, T=100000)}


@suite(STEPS, ["seqaccel[cpp] session", "seqaccel[cpp] step", "torch"])
def bench_hierarchical_attention_step(B, T):
    """One step of a stream of age T, in a session and by the module, beside one query of dense attention over a cache
    of T tokens."""
    attention = seqaccel.nn.HierarchicalAttention(256, 4, batch_first=True).eval()
    session = seqaccel.Session(attention, B)
    with torch.no_grad():
        prompt = torch.randn(1, T, 256)
        _, state = attention.extend(prompt, attention.init_state(1))
        states = [attention.select(state, torch.zeros(B, dtype=torch.int64))]
    session.extend(prompt.expand(B, T, 256))
    x, keys, values = torch.randn(B, 256), torch.randn(B, 4, T, 64), torch.randn(B, 4, T, 64)

    def ours():
        with torch.no_grad(), seqaccel.backend("cpp"):
            y, states[0] = attention.step(x, states[0])
            return y

    def dense():
        with torch.no_grad():
            q = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)[:, :256].view(B, 4, 1, 64)
            return attention.out_proj(F.scaled_dot_product_attention(q, keys, values).view(B, 256))

    nodes = seen_at(T)
    return Case(
        {"seqaccel[cpp] session": lambda: session.step(x), "seqaccel[cpp] step": ours, "torch": dense},
        flops=2 * B * 4 * 256 * 256 + 4 * B * 4 * 64 * nodes,
        bytes=4 * (4 * 256 * 256 + 2 * B * 4 * nodes * 64),
        same=(),
    )


# The density of each layout as drawn: random blocks of 64 in T=4096.
SPARSE_SIZES = {
    "density=0.1": dict(B=1, H=4, T=4096, D=64, density=0.1),
    "density=1": dict(B=1, H=4, T=4096, D=64, density=1.0),
}


def sparse_case(B, H, T, D, density, training, backend="cpp", device="cpu", dtype=torch.float32, block=BLOCK):
    """Block-sparse attention beside dense attention without a mask and, but for training on a CPU, FlexAttention."""
    *inputs, grad = make_inputs(B, H, T, D, device, dtype)
    leaves = [t.requires_grad_(training) for t in inputs]
    layout = (torch.rand(T // block, T // block) < density).to(device)
    seen = int(layout.sum()) * block**2

    def run(function):
        def call():
            with torch.set_grad_enabled(training), seqaccel.backend(backend):
                out = function(*leaves)
                return torch.autograd.grad(out, leaves, grad) if training else out

        return call

    contenders = {
        f"seqaccel[{backend}]": run(lambda q, k, v: block_sparse_attention(q, k, v, layout, block_size=block)),
        "torch": run(F.scaled_dot_product_attention),
    }
    if not training or device != "cpu":  # it has no backward pass there
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        order = layout.int().argsort(dim=-1, descending=True, stable=True).int()[None, None]
        count = layout.sum(-1, dtype=torch.int32)[None, None]
        mask = BlockMask.from_kv_blocks(count, order, BLOCK_SIZE=block, seq_lengths=(T, T))
        compiled = torch.compile(flex_attention, dynamic=False)
        contenders["flex_attention"] = run(lambda q, k, v: compiled(q, k, v, block_mask=mask))
    products = 14 if training else 4  # two products forward, five backward
    size = leaves[0].element_size()
    return Case(
        contenders,
        flops=products * B * H * D * seen,
        bytes=(8 if training else 4) * B * H * T * D * size,
        dtype=dtype,
        same=("torch", "flex_attention") if density == 1 else ("flex_attention",),
    )


@suite(SPARSE_SIZES, ["seqaccel[cpp]", "torch", "flex_attention"])
def bench_block_sparse_attention_forward(B, H, T, D, density):
    return sparse_case(B, H, T, D, density, training=False)


@suite(SPARSE_SIZES, ["seqaccel[cpp]", "torch"])
def bench_block_sparse_attention_training(B, H, T, D, density):
    return sparse_case(B, H, T, D, density, training=True)


ADDITIVE_SIZES = {
    "Tq=50": dict(B=16, Tq=50, Tk=400, H=512),
    "Tq=1": dict(B=16, Tq=1, Tk=400, H=512),
}


def broadcast_form(query, key, value, weight):
    return torch.softmax(torch.tanh(query[:, :, None] + key[:, None]) @ weight, -1) @ value


def additive_case(B, Tq, Tk, H, backend="cpp", device="cpu", dtype=torch.float32):
    """Beside torch's operators on a tensor (B, Tq, Tk, H), and the same compiled."""
    torch.manual_seed(0)
    shapes = ((B, Tq, H), (B, Tk, H), (B, Tk, H), (H,))
    leaves = [torch.randn(*s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
    grad = torch.randn(B, Tq, H, device=device, dtype=dtype)

    def run(function):
        def call():
            with seqaccel.backend(backend):
                return torch.autograd.grad(function(*leaves), leaves, grad)

        return call

    functions = {
        f"seqaccel[{backend}]": additive_attention,
        "torch": broadcast_form,
        "torch.compile": torch.compile(broadcast_form, dynamic=False),
    }
    contenders = {name: run(function) for name, function in functions.items()}
    size = leaves[0].element_size()
    return Case(contenders, flops=18 * B * Tq * Tk * H, bytes=2 * B * (2 * Tq + 2 * Tk) * H * size, dtype=dtype)


@suite(ADDITIVE_SIZES, ["seqaccel[cpp]", "torch", "torch.compile"])
def bench_additive_attention_training(B, Tq, Tk, H):
    return additive_case(B, Tq, Tk, H)


# `kinds` vectors over and over: so many are kept.
MEMORY_SIZES = {
    "T=4096,all kept": dict(B=1, T=4096, E=256, kinds=4096),
    "T=4096,256 kept": dict(B=1, T=4096, E=256, kinds=256),
}
GATE_SIZES = {
    "T=1024,all kept": dict(B=1, T=1024, E=256, kinds=1024),
    "T=1024,64 kept": dict(B=1, T=1024, E=256, kinds=64),
}


def repeated(B, T, E, kinds):
    """(B, T, E): ``kinds`` vectors over and over; and how many pairs of a vector and one kept before it there are."""
    torch.manual_seed(0)
    x = torch.randn(B, kinds, E).repeat(1, T // kinds, 1)
    return x, B * sum(min(t, kinds) for t in range(1, T + 1))


@suite(GATE_SIZES, ["seqaccel[cpp]", "seqaccel[reference]"])
def bench_novelty_gate(B, T, E, kinds):
    """Beside the definition, a loop of torch's operators over the vectors."""
    x, pairs = repeated(B, T, E, kinds)

    def run(backend):
        def call():
            with seqaccel.backend(backend):
                return novelty_gate(x, threshold=0.99)

        return call

    contenders = {f"seqaccel[{backend}]": run(backend) for backend in ("cpp", "reference")}
    torch.testing.assert_close(*(call() for call in contenders.values()))
    return Case(contenders, flops=2 * pairs * E, bytes=4 * B * T * E)


def memory_case(B, T, E, kinds, training):
    """The module beside the same projections around dense causal attention, which it equals for repeated vectors.

    What our gate keeps is attended to by torch's operators.
    """
    x, pairs = repeated(B, T, E, kinds)
    memory = seqaccel.nn.NoveltyMemory(E, 4, batch_first=True, threshold=0.99)
    leaves, grad = [x.requires_grad_(training), *memory.parameters()], torch.randn(B, T, E)

    def remember():
        with seqaccel.backend("cpp"):
            return memory(x, x, x)[0]

    def dense():
        qkv = F.linear(x, memory.in_proj_weight, memory.in_proj_bias).view(B, T, 3, 4, E // 4).permute(2, 0, 3, 1, 4)
        return memory.out_proj(F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2))

    def run(function):
        def call():
            with torch.set_grad_enabled(training):
                return torch.autograd.grad(function(), leaves, grad) if training else function()

        return call

    torch.testing.assert_close(remember(), dense(), rtol=1e-4, atol=1e-5)
    flops = (3 if training else 1) * 8 * B * T * E * E + (2 + (14 if training else 4)) * pairs * E
    moved = 4 * (2 * B * T * E + 4 * E * E) * (2 if training else 1)
    contenders = {"seqaccel[cpp]": run(remember), "torch": run(dense)}
    return Case(contenders, flops=flops, bytes=moved, forbidden=(), same=())  # they were compared, without gradients


@suite(MEMORY_SIZES, ["seqaccel[cpp]", "torch"])
def bench_novelty_memory_forward(B, T, E, kinds):
    return memory_case(B, T, E, kinds, training=False)


@suite(MEMORY_SIZES, ["seqaccel[cpp]", "torch"])
def bench_novelty_memory_training(B, T, E, kinds):
    return memory_case(B, T, E, kinds, training=True)


DECODER_SIZES = {f"S={S}": dict(B=16, T=50, S=S, H=512) for S in (50, 400)}


def loop_of_cells(decoder, x, memory):
    """torch.nn.LSTMCell step by step, the attention by torch's operators on a tensor (B, 1, S, H)."""
    attention, layer = decoder.attention, decoder.layers[0]
    key, state, outputs = attention.key_proj(memory), None, []
    h = x.new_zeros(x.shape[0], layer.hidden_size)
    for x_t in x.unbind(1):
        context = broadcast_form(attention.query_proj(h)[:, None], key, memory, attention.weight).squeeze(1)
        weights = layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh
        state = torch.lstm_cell(torch.cat([x_t, context], 1), state or (h, h), *weights)
        h = state[0]
        outputs.append(torch.cat([h, context], 1))
    return torch.stack(outputs, 1)


@suite(DECODER_SIZES, ["seqaccel[cpp]", "torch"])
def bench_attention_lstm_decoder_training(B, T, S, H):
    """Teacher-forced: forward and backward of a layer with input feeding and additive attention."""
    torch.manual_seed(0)
    decoder = AttentionLSTMDecoder(H, H, H)
    x, memory = torch.randn(B, T, H), torch.randn(B, S, H)
    grad = torch.randn(B, T, 2 * H)

    torch.testing.assert_close(decoder(x, memory)[0], loop_of_cells(decoder, x, memory), rtol=1e-4, atol=1e-4)

    def ours():
        with seqaccel.backend("cpp"):
            return torch.autograd.grad(decoder(x, memory)[0], list(decoder.parameters()), grad)

    def theirs():
        return torch.autograd.grad(loop_of_cells(decoder, x, memory), list(decoder.parameters()), grad)

    products = 8 * H * 3 * H + 2 * H * H
    flops = 3 * B * T * (products + 2 * S * H) + 16 * B * T * S * H + 6 * B * S * H * H
    parameters = sum(p.numel() for p in decoder.parameters())
    return Case({"seqaccel[cpp]": ours, "torch": theirs}, flops=flops, bytes=4 * (3 * parameters + 4 * B * (T + S) * H))


GPU_SIZES = {name: size | dict(B=16) for name, size in SIZES.items()}
GPU_SIZES["T=65536"] = dict(B=4, H=4, T=65536, D=64, causal=True)


def flex(q, k, v):
    """FlexAttention over the same causal pattern: tokens with the pooled nodes of two levels behind them.

    The nodes' keys are no summaries here, only as many: pooling is left out of its time.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, span = q.shape[2], BLOCK * BLOCK
    first, second = T // BLOCK, T // span
    keys, values = (torch.cat([t, t[:, :, :first], t[:, :, :second]], 2) for t in (k, v))

    def seen(b, h, query, node):
        cell, parent = query // BLOCK, query // span
        token = (node < T) & (node <= query) & (cell - node // BLOCK < NEAR)
        one, two = node - T, node - T - first
        of_first = (one >= 0) & (two < 0) & (cell - one >= NEAR) & (parent - one // BLOCK < NEAR)
        return token | of_first | ((two >= 0) & (parent - two >= NEAR))

    mask = create_block_mask(seen, None, None, T, T + first + second, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, keys, values, block_mask=mask)


@suite(GPU_SIZES, ["seqaccel[triton]", "torch", "flex_attention"], device="cuda")
def bench_hierarchical_attention_forward_gpu(B, H, T, D, causal):
    case = forward_case(B, H, T, D, causal, "triton", "cuda", torch.bfloat16)
    if causal and T == 8192:  # compiling takes long
        case.contenders["flex_attention"] = flex(*make_inputs(B, H, T, D, "cuda", torch.bfloat16)[:3])
    return case


@suite(GPU_SIZES, ["seqaccel[triton]", "torch"], device="cuda")
def bench_hierarchical_attention_training_gpu(B, H, T, D, causal):
    return training_case(B, H, T, D, causal, "triton", "cuda", torch.bfloat16)


# FlexAttention's kernels take blocks of 128.
SPARSE_GPU_SIZES = {
    "density=0.1": dict(B=16, H=4, T=8192, D=64, density=0.1, block=128),
    "density=1": dict(B=16, H=4, T=8192, D=64, density=1.0, block=128),
}


@suite(SPARSE_GPU_SIZES, ["seqaccel[triton]", "torch", "flex_attention"], device="cuda")
def bench_block_sparse_attention_forward_gpu(B, H, T, D, density, block):
    return sparse_case(B, H, T, D, density, False, "triton", "cuda", torch.bfloat16, block)


@suite(SPARSE_GPU_SIZES, ["seqaccel[triton]", "torch", "flex_attention"], device="cuda")
def bench_block_sparse_attention_training_gpu(B, H, T, D, density, block):
    return sparse_case(B, H, T, D, density, True, "triton", "cuda", torch.bfloat16, block)


@suite(ADDITIVE_SIZES, ["seqaccel[triton]", "torch", "torch.compile"], device="cuda")
def bench_additive_attention_training_gpu(B, Tq, Tk, H):
    return additive_case(B, Tq, Tk, H, "triton", "cuda", torch.bfloat16)
