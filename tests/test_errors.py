"""Bad arguments: every public call refuses them, and says which argument it was."""

import re

import numpy
import pytest
import torch

import seqaccel
from seqaccel import functional as SF
from seqaccel import nn

T, B, I, H = 5, 3, 4, 6
NAN = float("nan")
NOT_TENSORS = (None, [1.0, 2.0], numpy.zeros((2, 2)), "tensor", 3)
NOT_OPTIONAL_TENSORS = NOT_TENSORS[1:]
NOT_INTS = ("3", 2.5, None)
NOT_NUMBERS = ("0.5", [0.5], NAN)
NOT_FLAGS = ("yes", 0.5)
WRONG = (torch.zeros(1), torch.zeros(2, 2, 2, 2, 2))  # shapes that fit nowhere


def rows(gates):
    return {
        "input": torch.randn(T, B, I),
        "weight_ih": torch.randn(gates * H, I),
        "weight_hh": torch.randn(gates * H, H),
        "bias_ih": torch.randn(gates * H),
        "bias_hh": torch.randn(gates * H),
    }


def pair():
    return torch.randn(B, H), torch.randn(B, H)


TENSOR, OPTIONAL = (*NOT_TENSORS, *WRONG), (*NOT_OPTIONAL_TENSORS, *WRONG)
#: A mask of steps, which is bool.
EPISODES = (*NOT_OPTIONAL_TENSORS, torch.zeros(T, B), torch.zeros(B, T), torch.ones(2, dtype=torch.bool))
#: A tensor of another dtype, where it must be that of the others.
LONG = torch.zeros(1, dtype=torch.int64)
STATES = (
    torch.zeros(B, H),
    pair()[:1],
    (*pair(), torch.zeros(B, H)),
    (),
    (None, None),
    "ab",
    3,
    (torch.zeros(1), torch.zeros(1)),
)
LENGTHS = ([5, 5, 5], torch.tensor([5.0, 5, 5]), torch.tensor([5, 5]), torch.tensor([0, 5, 5]), torch.tensor([5, 9, 5]))
ZONEOUTS = (0.1, (0.1,), (0.1, 0.1, 0.1), ("0.1", 0.1), (NAN, 0.1), (0.1, 2.0), (torch.zeros(2), None))
RESETS = (
    [[False] * B] * T,
    3,
    torch.zeros(T, B),
    torch.zeros(B, T, dtype=torch.bool),
    torch.zeros(T, dtype=torch.bool),
)
RECURRENT = {
    **dict.fromkeys(("input", "weight_ih", "weight_hh"), TENSOR),
    **dict.fromkeys(("bias_ih", "bias_hh"), OPTIONAL),
    "lengths": LENGTHS,
    "reverse": NOT_FLAGS,
    "reset": RESETS,
}
WITH_CELL = {**RECURRENT, "state": STATES, "zoneout": ZONEOUTS}
Q = torch.randn(2, 4, 9, 8)
ROWS = torch.randn(B, T, I)

#: Public function or constructor: valid arguments, bad values of each.
CALLS = {
    "rnn": (
        SF.rnn,
        lambda: {**rows(1), "h_0": None},
        {**RECURRENT, "h_0": OPTIONAL, "nonlinearity": ("sine", None, 3)},
    ),
    "gru": (
        SF.gru,
        lambda: {**rows(3), "h_0": None},
        {**RECURRENT, "h_0": OPTIONAL, "zoneout": ("0.1", NAN, -0.1, [0.1], torch.zeros(2)), "reset_after": NOT_FLAGS},
    ),
    "lstm": (SF.lstm, lambda: {**rows(4), "state": None}, {**WITH_CELL, "weight_hr": OPTIONAL}),
    "peephole_lstm": (
        SF.peephole_lstm,
        lambda: {**rows(4), "state": None, "weight_peephole": torch.randn(3, H)},
        {**WITH_CELL, "weight_peephole": TENSOR},
    ),
    "layer_norm_lstm": (
        SF.layer_norm_lstm,
        lambda: {
            **rows(4),
            "state": None,
            "ln_ih_weight": torch.ones(4 * H),
            "ln_hh_weight": torch.ones(4 * H),
            "ln_c_weight": torch.ones(H),
            "ln_c_bias": torch.zeros(H),
        },
        {**WITH_CELL, "ln_ih_weight": TENSOR, "ln_c_bias": TENSOR, "normalize_cell": NOT_FLAGS},
    ),
    "layer_norm_gru": (
        SF.layer_norm_gru,
        lambda: {**rows(3), "h_0": None, "ln_ih_weight": torch.ones(3 * H), "ln_hh_weight": torch.ones(3 * H)},
        {**RECURRENT, "h_0": OPTIONAL, "ln_hh_weight": TENSOR},
    ),
    "multiplicative_lstm": (
        SF.multiplicative_lstm,
        lambda: {**rows(4), "state": None, "weight_mx": torch.randn(H, I), "weight_mh": torch.randn(H, H)},
        {**WITH_CELL, "weight_mx": TENSOR, "weight_mh": TENSOR},
    ),
    "ligru": (
        SF.ligru,
        lambda: {**rows(2), "h_0": None, "mask": torch.ones(B, H)},
        {**RECURRENT, "h_0": OPTIONAL, "mask": OPTIONAL, "weight_ih": OPTIONAL, "nonlinearity": ("sine", None)},
    ),
    "linear_scan": (
        SF.linear_scan,
        lambda: {"a": torch.randn(B, T, H), "b": torch.randn(B, T, H)},
        {
            "a": (*NOT_TENSORS, LONG),
            "b": (*NOT_TENSORS, LONG, torch.zeros(7)),
            "h_0": (*NOT_OPTIONAL_TENSORS, LONG, torch.zeros(7)),
            "reverse": NOT_FLAGS,
            "dim": ("1", 2.5, 7),
            "cu_seqlens": (*NOT_OPTIONAL_TENSORS, torch.tensor([0.0, T]), torch.tensor([0, T]), torch.tensor(0)),
            "reset": EPISODES,
            "return_last": NOT_FLAGS,
        },
    ),
    "scan_summary": (
        SF.scan_summary,
        lambda: {"a": torch.randn(B, T, H), "b": torch.randn(B, T, H)},
        {"a": (*NOT_TENSORS, LONG), "b": (*NOT_TENSORS, LONG, torch.zeros(7)), "dim": ("1", 2.5, 7)},
    ),
    "join_summaries": (
        SF.join_summaries,
        lambda: {name: (torch.ones(B, H), torch.ones(B, H)) for name in ("first", "second")},
        {name: (None, torch.ones(B, H), (torch.ones(B, H),), (1.0, torch.ones(B, H))) for name in ("first", "second")},
    ),
    "sru": (
        SF.sru,
        lambda: {
            "u": torch.randn(T, B, 3 * H),
            "x": torch.randn(T, B, H),
            "weight_c": torch.zeros(2 * H),
            "bias": torch.zeros(2 * H),
        },
        {
            "u": TENSOR,
            "x": OPTIONAL,
            "weight_c": TENSOR,
            "bias": TENSOR,
            "c_0": OPTIONAL,
            "mask_c": OPTIONAL,
            "mask_pad": (*NOT_OPTIONAL_TENSORS, torch.zeros(T, B), torch.zeros(2, dtype=torch.bool)),
            "scale_x": ("1", [1.0], torch.zeros(2)),
            "directions": (0, 3, "1", None),
            "use_tanh": NOT_FLAGS,
        },
    ),
    "sru_layer": (
        SF.sru_layer,
        lambda: {
            "input": torch.randn(T, B, I),
            "weight": torch.randn(I, 3 * H),
            "x": torch.randn(T, B, H),
            "weight_c": torch.zeros(2 * H),
            "bias": torch.zeros(2 * H),
        },
        {
            "input": TENSOR,
            "weight": TENSOR,
            "x": OPTIONAL,
            "weight_c": TENSOR,
            "bias": TENSOR,
            "c_0": OPTIONAL,
            "directions": (0, "1"),
        },
    ),
    **{
        name: (
            getattr(SF, name),
            lambda rows=rows, weights=weights: {
                "u": torch.randn(T, B, rows * H),
                **dict.fromkeys(weights, torch.zeros(H)),
            },
            {
                "u": TENSOR,
                **dict.fromkeys(weights, TENSOR),
                "bias": OPTIONAL,
                "c_0" if name == "fo_pool" else "h_0": OPTIONAL,
                "mask_pad": (*NOT_OPTIONAL_TENSORS, torch.zeros(T, B), torch.zeros(2, dtype=torch.bool)),
                "reset": EPISODES,
                "cu_seqlens": (*NOT_OPTIONAL_TENSORS, torch.zeros(2), torch.tensor([0, T])),
                "directions": (0, 3, "1", None),
                **own,
            },
        )
        for name, rows, weights, own in (
            ("fo_pool", 3, (), {"mask": OPTIONAL, "scale": ("1", [1.0], torch.zeros(2)), "output_gate": NOT_FLAGS}),
            ("indrnn", 1, ("weight",), {"nonlinearity": ("sine", None)}),
            ("min_gru", 2, (), {"candidate": ("h", None)}),
            ("min_lstm", 3, (), {"candidate": ("h", None)}),
        )
    },
    "column_layer": (
        SF.column_layer,
        lambda: {"cell": "indrnn_relu", "input": torch.randn(T, B, I), "weight": torch.randn(H, I)},
        {
            "cell": ("lstm", None, 3),
            "input": TENSOR,
            "weight": TENSOR,
            "weight_hh": OPTIONAL,
            "bias": OPTIONAL,
            "c_0": OPTIONAL,
            "directions": (0, "1"),
        },
    ),
    "causal_conv1d": (
        SF.causal_conv1d,
        lambda: {"x": torch.randn(B, I, T), "weight": torch.randn(H, I, 3)},
        {
            "x": TENSOR,
            "weight": TENSOR,
            "bias": OPTIONAL,
            "residual": OPTIONAL,
            "initial_state": OPTIONAL,
            "return_final_state": NOT_FLAGS,
            "channels_last": NOT_FLAGS,
            "reset": EPISODES,
            "cu_seqlens": (*NOT_OPTIONAL_TENSORS, torch.zeros(2), torch.tensor([0, T])),
            "padding_mode": ("reflect", 3),
            "stride": (*NOT_INTS, 0, True),
            "dilation": (*NOT_INTS, 0, True),
            "groups": (*NOT_INTS, 0),
            "activation": ("elu", 3, "\ud800"),
            "dropout": (*NOT_NUMBERS, None, -1, 2),
            "output_activation": ("tanh", 3, "\ud800"),
        },
    ),
    "causal_conv_transpose1d": (
        SF.causal_conv_transpose1d,
        lambda: {"x": torch.randn(B, I, T), "weight": torch.randn(I, H, 3), "stride": 2},
        {
            "x": TENSOR,
            "weight": TENSOR,
            "bias": OPTIONAL,
            "initial_state": OPTIONAL,
            "return_final_state": NOT_FLAGS,
            "stride": (*NOT_INTS, 0, True),
            "dilation": (*NOT_INTS, 0, True),
            "groups": (*NOT_INTS, 0),
            "activation": ("elu", 3),
            "reset": EPISODES,
        },
    ),
    "causal_conv2d": (
        SF.causal_conv2d,
        lambda: {"x": torch.randn(B, I, T, 4), "weight": torch.randn(H, I, 2, 3)},
        {
            "x": TENSOR,
            "weight": TENSOR,
            "bias": OPTIONAL,
            "residual": OPTIONAL,
            "initial_state": OPTIONAL,
            "dilation": (*NOT_INTS, 0, True, (1, 2, 3)),
            "groups": (*NOT_INTS, 0),
            "activation": ("elu", 3),
            "dropout": (*NOT_NUMBERS, None, -1, 2),
            "output_activation": ("tanh", 3),
            "reset": EPISODES,
        },
    ),
    "convolutional_gru": (
        SF.convolutional_gru,
        lambda: {
            "x": torch.randn(B, H, 4, T),
            "weight_gates": torch.randn(2 * H, H, 3, 3),
            "bias_gates": None,
            "weight_candidate": torch.randn(H, H, 3, 3),
        },
        {
            "x": TENSOR,
            "weight_gates": TENSOR,
            "bias_gates": OPTIONAL,
            "weight_candidate": TENSOR,
            "bias_candidate": OPTIONAL,
            "gates": ("tanh", None, 3),
        },
    ),
    "wavenet_layer": (
        SF.wavenet_layer,
        lambda: {
            "x": torch.randn(B, I, T),
            "weight": torch.randn(2 * H, I, 2),
            "bias": None,
            "output_weight": torch.randn(I + 2, H, 1),
        },
        {
            "x": TENSOR,
            "weight": TENSOR,
            "bias": OPTIONAL,
            "output_weight": TENSOR,
            "output_bias": OPTIONAL,
            "dilation": (*NOT_INTS, 0, True),
            "skip": OPTIONAL,
            "condition": OPTIONAL,
            "global_condition": OPTIONAL,
            "residual": NOT_FLAGS,
            "initial_state": OPTIONAL,
            "reset": EPISODES,
        },
    ),
    "temporal_block": (
        SF.temporal_block,
        lambda: {
            "x": torch.randn(B, I, T),
            "weight_1": torch.randn(H, I, 3),
            "bias_1": None,
            "weight_2": torch.randn(H, H, 3),
            "downsample_weight": torch.randn(H, I, 1),
        },
        {
            "x": TENSOR,
            "weight_1": TENSOR,
            "bias_1": OPTIONAL,
            "weight_2": TENSOR,
            "bias_2": OPTIONAL,
            "downsample_weight": OPTIONAL,
            "downsample_bias": OPTIONAL,
            "g_1": OPTIONAL,
            "g_2": OPTIONAL,
            "dilation": (*NOT_INTS, 0, True),
            "activation": ("elu", "glu", 3),
            "use_gate": NOT_FLAGS,
            "dropout": (*NOT_NUMBERS, None, -1, 2),
            "reset": EPISODES,
        },
    ),
    "additive_attention": (
        SF.additive_attention,
        lambda: {"query": ROWS, "key": ROWS, "value": ROWS, "weight": torch.randn(I)},
        {
            "query": TENSOR,
            "key": TENSOR,
            "value": TENSOR,
            "weight": (*TENSOR, torch.randn(2, 3)),
            "scale": ("1", True, torch.ones(2)),
            "mask": (*NOT_OPTIONAL_TENSORS, torch.ones(B, T), torch.ones(2, 3, dtype=torch.bool)),
            "need_weights": NOT_FLAGS,
        },
    ),
    "attention_lstm": (
        SF.attention_lstm,
        lambda: {
            "input": torch.randn(B, T, I),
            "state": (torch.randn(B, H), torch.randn(B, H)),
            "key": torch.randn(B, 5, 3),
            "value": torch.randn(B, 5, 2),
            "weight_ih": torch.randn(4 * H, I + 2),
            "weight_hh": torch.randn(4 * H, H),
            "query_weight": torch.randn(3, H),
        },
        {
            "input": (*TENSOR, torch.randn(B, T), torch.zeros(B, T, I, dtype=torch.int64)),
            "state": (3, (None, None), (torch.randn(B, H),), (torch.randn(B, H), torch.randn(B, 1))),
            "key": (*TENSOR, torch.randn(B, 5, 0), torch.randn(1, 5, 3)),
            "value": (*TENSOR, torch.randn(B, 4, 2)),
            "weight_ih": (*TENSOR, torch.randn(4 * H, I)),
            "weight_hh": (*TENSOR, torch.randn(3 * H, H)),
            "bias_ih": OPTIONAL,
            "bias_hh": OPTIONAL,
            "query_weight": OPTIONAL,
            "query_bias": OPTIONAL,
            "score_weight": OPTIONAL,
            "scale": ("1", True, torch.ones(2)),
            "mask": (*NOT_OPTIONAL_TENSORS, torch.ones(B, 5), torch.ones(2, 3, dtype=torch.bool)),
            "lengths": (*NOT_OPTIONAL_TENSORS, torch.ones(B), torch.ones(B + 1, dtype=torch.int64)),
        },
    ),
    "multiplicative_attention": (
        SF.multiplicative_attention,
        lambda: {"query": ROWS, "key": ROWS, "value": ROWS, "weight": torch.randn(I, I)},
        {
            "query": TENSOR,
            "key": TENSOR,
            "value": TENSOR,
            "weight": (*NOT_OPTIONAL_TENSORS, torch.randn(2, 3)),
            "scale": ("1", True, torch.ones(2)),
            "mask": (*NOT_OPTIONAL_TENSORS, torch.ones(B, T), torch.ones(2, 3, dtype=torch.bool)),
            "need_weights": NOT_FLAGS,
        },
    ),
    "attention_pool": (
        SF.attention_pool,
        lambda: {"key": Q, "value": Q},
        {
            "key": TENSOR,
            "value": TENSOR,
            "pool_query": (*NOT_OPTIONAL_TENSORS, torch.randn(2, 3)),
            "block_size": (*NOT_INTS, 1, True),
            "fanout": (*[x for x in NOT_INTS if x is not None], 1, True),
            "levels": (*[x for x in NOT_INTS if x is not None], -1, True),
            "scale": NOT_NUMBERS,
        },
    ),
    "block_sparse_attention": (
        SF.block_sparse_attention,
        lambda: {"query": Q, "key": Q, "value": Q, "layout": torch.ones(3, 3, dtype=torch.bool), "block_size": 4},
        {
            "query": TENSOR,
            "key": TENSOR,
            "value": TENSOR,
            "layout": (*TENSOR, torch.ones(2, 2), torch.ones(2, dtype=torch.bool)),
            "block_size": (*NOT_INTS, 0, True),
            "causal": NOT_FLAGS,
            "scale": NOT_NUMBERS,
        },
    ),
    "cfc": (
        SF.cfc,
        lambda: {
            "x": torch.randn(T, B, 2),
            "h_0": torch.zeros(B, H),
            "weights": [torch.randn(2, H), torch.randn(4 * H, 2)],
            "biases": [torch.randn(4 * H)],
        },
        {
            "x": (*TENSOR, torch.randn(T, 2)),
            "h_0": (*NOT_OPTIONAL_TENSORS, torch.zeros(B, H + 1), torch.zeros(B, H).double()),
            "weights": (None, 3, [], [torch.randn(2, H)], [torch.randn(2, H), torch.randn(H, 2)], [torch.randn(2)] * 2),
            "biases": (None, 3, [], [torch.randn(H)], [torch.randn(4 * H).double()]),
            "timespans": (*NOT_OPTIONAL_TENSORS, torch.ones(T), torch.ones(T, B).double()),
            "reset": RESETS,
            "mode": ("other", None),
            "activation": ("silu", None),
            "w_tau": (*NOT_OPTIONAL_TENSORS, torch.zeros(H)),
            "A": (*NOT_OPTIONAL_TENSORS, torch.zeros(H)),
        },
    ),
    "echo_state": (
        SF.echo_state,
        lambda: {
            "drive": torch.randn(T, B, 2),
            "rows": torch.tensor([0, 1, 2], dtype=torch.int32),
            "columns": torch.tensor([1, 0], dtype=torch.int32),
            "weight": torch.randn(2),
            "h_0": torch.zeros(B, 2),
        },
        {
            "drive": (*TENSOR, torch.randn(T, 2)),
            "rows": (*TENSOR, torch.tensor([0, 1, 2]), torch.zeros(2, dtype=torch.int32)),
            "columns": (*TENSOR, torch.tensor([1, 0]), torch.zeros(2, 1, dtype=torch.int32)),
            "weight": (*TENSOR, torch.randn(3), torch.randn(2).double()),
            "h_0": (*NOT_OPTIONAL_TENSORS, torch.zeros(B, 3), torch.zeros(B, 2).double()),
            "leak_rate": (*NOT_NUMBERS, None, -0.1, 1.1),
            "reset": RESETS,
        },
    ),
    "novelty_gate": (
        SF.novelty_gate,
        lambda: {
            "vectors": torch.randn(2, 5, 4),
            "kept": torch.randn(2, 3, 4),
            "size": torch.tensor([3, 1]),
            "threshold": 0.9,
        },
        {
            "vectors": (*TENSOR, torch.randn(5, 4), torch.zeros(2, 5, 4, dtype=torch.int64)),
            "kept": (3, "x", None, torch.randn(2, 3, 5), torch.randn(1, 3, 4), torch.zeros(2, 3, 4).double()),
            "size": (3, None, torch.tensor([3.0, 1.0]), torch.tensor([3])),
            "threshold": (*NOT_NUMBERS, None, -1, 1.1, float("nan")),
            "window": ("2", 0, 1.5),
            "capacity": ("2", 0, 1.5),
        },
    ),
    "top_k_layout": (
        SF.top_k_layout,
        lambda: {"query": Q, "key": Q, "k": 2, "block_size": 4},
        {
            "query": TENSOR,
            "key": TENSOR,
            "k": (*NOT_INTS, 0),
            "block_size": (*NOT_INTS, 0),
            "causal": NOT_FLAGS,
        },
    ),
    "hierarchical_attention": (
        SF.hierarchical_attention,
        lambda: {"query": Q, "key": Q, "value": Q},
        {
            "query": TENSOR,
            "key": TENSOR,
            "value": TENSOR,
            "pool_query": OPTIONAL,
            "block_size": (*NOT_INTS, 1, True),
            "fanout": ("2", 1),
            "levels": ("2", -1),
            "local_blocks": (*NOT_INTS, 0),
            "causal": NOT_FLAGS,
            "mass_bias": NOT_FLAGS,
            "scale": NOT_NUMBERS,
            "cu_seqlens": OPTIONAL,
            "lengths": OPTIONAL,
            "dropout_p": (*NOT_NUMBERS, None, 2, -1),
        },
    ),
    **{
        name: (
            getattr(nn, name),
            lambda: {"input_size": I, "hidden_size": H},
            {
                "input_size": ("4", 2.5, None, 0, -1),
                "hidden_size": ("4", 2.5, None, 0),
                "num_layers": (0, -1, 1.5, "2", None),
                "bias": NOT_FLAGS,
                "batch_first": NOT_FLAGS,
                "dropout": ("0.5", NAN, 2, -1, None, True),
                "bidirectional": NOT_FLAGS,
                "recurrent_dropout": ("0.5", NAN, 2, None),
                **(
                    {"zoneout": ("0.1", NAN, 2, None, (0.1,), (0.1, "0.1"))}
                    if name != "RNN"
                    else {"nonlinearity": ("sine", None)}
                ),
                **({"forget_bias": ("0.1", NAN, [1]), "proj_size": (-1, H, "2", 1.5)} if "LSTM" in name else {}),
            },
        )
        for name in ("RNN", "GRU", "LSTM", "PeepholeLSTM", "LayerNormLSTM", "LayerNormGRU", "MultiplicativeLSTM")
    },
    **{
        name: (
            getattr(nn, name),
            lambda: {"input_size": I, "hidden_size": H},
            {
                "input_size": ("4", 2.5, None),
                "hidden_size": ("4", 2.5, None),
            },
        )
        for name in ("RNNCell", "GRUCell", "LSTMCell")
    },
    **{
        name: (
            getattr(nn, name),
            lambda: {"input_size": I, "hidden_size": H},
            {
                "input_size": ("4", 2.5, None, 0),
                "hidden_size": ("4", 2.5, None, 0),
                "dropout": ("0.5", NAN, 2, None),
                "rnn_dropout": ("0.5", NAN, -1),
                "bidirectional": NOT_FLAGS,
                "use_tanh": NOT_FLAGS,
                "layer_norm": NOT_FLAGS,
                "highway_bias": NOT_NUMBERS,
                "weight_c_init": NOT_NUMBERS,
                "custom_m": ("m", 3),
                **(
                    {"projection_size": (-1, "2", 1.5), "num_layers": (0, "2", 1.5)}
                    if name == "SRU"
                    else {"n_proj": (-1, "2")}
                ),
            },
        )
        for name in ("SRU", "SRUCell")
    },
    **{
        name: (
            getattr(nn, name),
            lambda: {"input_size": I, "hidden_size": H},
            {
                "input_size": ("4", 2.5, None, 0, -1),
                "hidden_size": ("4", 2.5, None, 0),
                "num_layers": (0, -1, 1.5, "2", None),
                "bias": NOT_FLAGS,
                "batch_first": NOT_FLAGS,
                "dropout": ("0.5", NAN, 2, -1, None, True),
                "bidirectional": NOT_FLAGS,
                **own,
            },
        )
        for name, own in {
            "QRNN": {"window": (0, 3, "1", 1.5), "zoneout": ("0.1", NAN, 2), "output_gate": NOT_FLAGS},
            "MinGRU": {"candidate": ("h", None)},
            "MinLSTM": {"candidate": ("h", None)},
            "IndRNN": {"nonlinearity": ("sine", None)},
        }.items()
    },
    "SRUpp": (
        nn.SRUpp,
        lambda: {"input_size": I, "hidden_size": H, "proj_size": 4},
        {
            "input_size": ("4", 2.5, None, 0),
            "proj_size": ("4", 2.5, None, 0),
            "num_heads": (0, "1", 3),
            "num_layers": (0, "2", 1.5),
            "dropout": ("0.5", NAN, 2),
            "attn_dropout": ("0.5", NAN, -1),
            "bidirectional": NOT_FLAGS,
            "attn_layer_norm": NOT_FLAGS,
            "highway_bias": NOT_NUMBERS,
            "weight_c_init": NOT_NUMBERS,
            "attention_every_n_layers": (0, "1", 1.5),
            "attention_last_n_layers": ("1", 1.5),
        },
    ),
    "CausalConv1d": (
        nn.CausalConv1d,
        lambda: {"in_channels": I, "out_channels": H, "kernel_size": 3},
        {
            "in_channels": (*NOT_INTS, -1),
            "out_channels": NOT_INTS,
            "kernel_size": (*NOT_INTS, 0, (3, 3), ("3",)),
            "stride": (*NOT_INTS, 0),
            "dilation": (*NOT_INTS, 0),
            "groups": (*NOT_INTS, 0, 3),
            "bias": NOT_FLAGS,
            "channels_last": NOT_FLAGS,
            "padding_mode": ("reflect", 3),
            "activation": ("elu", 3),
        },
    ),
    "CausalConvTranspose1d": (
        nn.CausalConvTranspose1d,
        lambda: {"in_channels": I, "out_channels": H, "kernel_size": 3},
        {
            "in_channels": (*NOT_INTS, -1),
            "out_channels": NOT_INTS,
            "kernel_size": (*NOT_INTS, 0, (3, 3), ("3",)),
            "stride": (*NOT_INTS, 0),
            "dilation": (*NOT_INTS, 0),
            "groups": (*NOT_INTS, 0, 3),
            "bias": NOT_FLAGS,
            "activation": ("elu", 3),
        },
    ),
    "CausalConv2d": (
        nn.CausalConv2d,
        lambda: {"in_channels": I, "out_channels": H, "kernel_size": 3},
        {
            "in_channels": (*NOT_INTS, -1),
            "out_channels": NOT_INTS,
            "kernel_size": (*NOT_INTS, 0, 2, (3, 3, 3), ("3", 3)),
            "dilation": (*NOT_INTS, 0),
            "groups": (*NOT_INTS, 0, 3),
            "bias": NOT_FLAGS,
            "activation": ("elu", 3),
        },
    ),
    "ConvolutionalGRU": (
        nn.ConvolutionalGRU,
        lambda: {"channels": H},
        {
            "channels": (*NOT_INTS, 0),
            "kernel_size": (*NOT_INTS, 0, 2, (3, 3, 3), ("3", 3)),
            "gates": ("tanh", None, 3),
            "bias": NOT_FLAGS,
        },
    ),
    "NeuralGPU": (
        nn.NeuralGPU,
        lambda: {"vocabulary": 4},
        {
            **dict.fromkeys(("vocabulary", "channels", "width", "num_layers"), (*NOT_INTS, 0)),
            "kernel_size": (*NOT_INTS, 0, 2, (3, 3, 3)),
            "output_vocabulary": ("4", 2.5, 0),
            "gates": ("tanh", None, 3),
            "dropout": (*NOT_NUMBERS, None, 2),
        },
    ),
    "GatedConv1d": (
        nn.GatedConv1d,
        lambda: {"in_channels": I, "out_channels": H, "kernel_size": 3},
        {"in_channels": (*NOT_INTS, -1), "out_channels": (*NOT_INTS, -1), "activation": ("relu", None, 3)},
    ),
    "WaveNetLayer": (
        nn.WaveNetLayer,
        lambda: {"residual_channels": I, "skip_channels": H},
        {
            **dict.fromkeys(("residual_channels", "skip_channels", "kernel_size", "dilation"), (*NOT_INTS, 0)),
            **dict.fromkeys(("gate_channels", "condition_channels", "global_channels"), ("4", 2.5, 0)),
            "bias": NOT_FLAGS,
        },
    ),
    "WaveNet": (
        nn.WaveNet,
        lambda: {"in_channels": I, "residual_channels": H, "skip_channels": H, "layers": 2},
        {
            **dict.fromkeys(("in_channels", "residual_channels", "skip_channels", "layers"), (*NOT_INTS, 0)),
            **dict.fromkeys(("stacks", "kernel_size", "input_kernel_size"), (*NOT_INTS, 0)),
            **dict.fromkeys(("out_channels", "gate_channels", "head_channels"), ("4", 2.5, 0)),
            **dict.fromkeys(("condition_channels", "global_channels"), ("4", 2.5, 0)),
            **dict.fromkeys(("embedding", "bias"), NOT_FLAGS),
        },
    ),
    "GatedConvLM": (
        nn.GatedConvLM,
        lambda: {"num_embeddings": 9, "embedding_dim": I, "channels": H, "num_layers": 1, "kernel_size": 2},
        {
            **dict.fromkeys(("num_embeddings", "embedding_dim", "channels"), (*NOT_INTS, 0)),
            **dict.fromkeys(("num_layers", "kernel_size"), (*NOT_INTS, 0)),
            "bottleneck_channels": ("4", 2.5, 0),
            "dropout": (*NOT_NUMBERS, None, 2),
            "cutoffs": (3, "3"),
        },
    ),
    "TCN": (
        nn.TCN,
        lambda: {"num_inputs": I, "num_channels": [H, H]},
        {
            "num_inputs": (*NOT_INTS, 0),
            "num_channels": ([], "6", 6, None, [2.5], ["6"]),
            "kernel_size": (*NOT_INTS, 0),
            "dropout": (*NOT_NUMBERS, None, 2),
        },
    ),
    "AdditiveAttention": (
        nn.AdditiveAttention,
        lambda: {"query_size": 4, "key_size": 4, "hidden_size": 5},
        {
            "query_size": (*NOT_INTS, 0),
            "key_size": ("3", 2.5, 0),
            "hidden_size": (*NOT_INTS, 0),
            "normalize": NOT_FLAGS,
            "bias": NOT_FLAGS,
        },
    ),
    "AttentionLSTMDecoder": (
        nn.AttentionLSTMDecoder,
        lambda: {"input_size": I, "hidden_size": H, "memory_size": 4},
        {
            "input_size": (*NOT_INTS, 0),
            "hidden_size": (*NOT_INTS, 0),
            "memory_size": (*NOT_INTS, 0),
            "num_layers": (*NOT_INTS, 0),
            "attention": ("loud", None, 3),
            "attention_size": ("3", 2.5, 0),
            "normalize": NOT_FLAGS,
            "input_feeding": NOT_FLAGS,
            "residual_from": ("3", 2.5, 0),
            "dropout": (*NOT_NUMBERS, None, 2),
            "bias": NOT_FLAGS,
        },
    ),
    "GNMT": (
        nn.GNMT,
        lambda: {"source_vocabulary": 5, "target_vocabulary": 6, "hidden_size": H, "num_layers": 2},
        {
            "source_vocabulary": (*NOT_INTS, 0),
            "target_vocabulary": (*NOT_INTS, 0),
            "hidden_size": (*NOT_INTS, 0),
            "num_layers": (*NOT_INTS, 0),
            "embedding_dim": ("3", 2.5, 0),
            "attention_size": ("3", 2.5, 0),
            "input_feeding": NOT_FLAGS,
            "dropout": (*NOT_NUMBERS, None, 2),
        },
    ),
    "MultiplicativeAttention": (
        nn.MultiplicativeAttention,
        lambda: {"query_size": 4, "key_size": 4},
        {
            "query_size": (*NOT_INTS, 0),
            "key_size": ("3", 2.5, 0),
            "general": NOT_FLAGS,
            "scale": ("1", [0.5], NAN),
        },
    ),
    "BlockSparseAttention": (
        nn.BlockSparseAttention,
        lambda: {"embed_dim": 8, "num_heads": 2},
        {
            "embed_dim": (*NOT_INTS, 0, 7),
            "num_heads": (*NOT_INTS, 0, 3),
            "dropout": (0.1, "0", None),
            "add_bias_kv": (True, "no"),
            "kdim": ("8", 0),
            "batch_first": NOT_FLAGS,
            "layout": (3, "window", torch.ones(2, 2), torch.ones(2, dtype=torch.bool)),
            "block_size": (*NOT_INTS, 0),
            "causal": NOT_FLAGS,
        },
    ),
    **{
        name: (
            getattr(nn, name),
            lambda: {"input_size": I, "hidden_size": H},
            {
                "input_size": ("4", 2.5, None, 0),
                "hidden_size": ("4", 2.5, None, 0),
                "mode": ("other", None),
                "activation": ("silu", None),
                "backbone_units": ("4", 2.5, None, 0),
                "backbone_layers": (8, -1, 1.5, None),
                **({"batch_first": NOT_FLAGS} if name == "CfC" else {}),
            },
        )
        for name in ("CfC", "CfCCell")
    },
    "LiGRU": (
        nn.LiGRU,
        lambda: {"input_size": I, "hidden_size": H},
        {
            "input_size": ("4", 2.5, None, 0),
            "hidden_size": ("4", 2.5, None, 0),
            "num_layers": (0, -1, 1.5, "2", None),
            "bias": NOT_FLAGS,
            "batch_first": NOT_FLAGS,
            "dropout": ("0.5", NAN, 2, -1, None, True),
            "bidirectional": NOT_FLAGS,
            "nonlinearity": ("sine", None),
            "normalization": ("none", None, 3),
        },
    ),
    "EchoStateNetwork": (
        nn.EchoStateNetwork,
        lambda: {"input_size": I, "hidden_size": H, "output_size": 2},
        {
            **dict.fromkeys(("input_size", "hidden_size", "output_size", "num_layers"), (*NOT_INTS, 0)),
            "batch_first": NOT_FLAGS,
            **dict.fromkeys(("spectral_radius", "input_scaling", "bias_scaling"), (*NOT_NUMBERS, None, -1)),
            **dict.fromkeys(("leak_rate", "connectivity"), (*NOT_NUMBERS, None, 0, 1.1)),
            "generator": (3, "seed"),
        },
    ),
    "NoveltyMemory": (
        nn.NoveltyMemory,
        lambda: {"embed_dim": 8, "num_heads": 2},
        {
            "embed_dim": (*NOT_INTS, 0, 7),
            "num_heads": (*NOT_INTS, 0, 3),
            "dropout": (0.1, "0", None),
            "add_bias_kv": (True, "no"),
            "kdim": ("8", 0),
            "batch_first": NOT_FLAGS,
            "threshold": (*NOT_NUMBERS, None, -1, 1.1),
            "window": ("2", 0, 1.5),
        },
    ),
    "HierarchicalAttention": (
        nn.HierarchicalAttention,
        lambda: {"embed_dim": 8, "num_heads": 2},
        {
            "embed_dim": (*NOT_INTS, 0, 7),
            "num_heads": (*NOT_INTS, 0, 3),
            "dropout": (*NOT_NUMBERS, None, 2),
            "bias": NOT_FLAGS,
            "add_bias_kv": (True, "no"),
            "kdim": ("8", 0),
            "vdim": (2.5,),
            "batch_first": NOT_FLAGS,
            "pool_query": (*NOT_INTS, -1),
            "block_size": (*NOT_INTS, 1),
            "fanout": ("2", 1),
            "levels": ("1", -1),
            "local_blocks": (*NOT_INTS, 0),
            "causal": NOT_FLAGS,
            "mass_bias": NOT_FLAGS,
            "rotary_base": (*NOT_NUMBERS, 0.0),
            "num_kv_heads": ("2", 0, 2.5, 3),
        },
    ),
    "HierarchicalAttentionEncoder": (
        nn.HierarchicalAttentionEncoder,
        lambda: {"d_model": 8, "nhead": 2, "num_layers": 1},
        {
            "d_model": (*NOT_INTS, 0, 7),
            "nhead": (*NOT_INTS, 0, 3),
            "num_layers": (*NOT_INTS, 0),
            "dim_feedforward": (*NOT_INTS, 0),
            "dropout": (*NOT_NUMBERS, None, 2),
            "activation": ("tanh", 3, None),
            "layer_norm_eps": (*NOT_NUMBERS, None),
            "batch_first": NOT_FLAGS,
            "norm_first": NOT_FLAGS,
            "bias": NOT_FLAGS,
            "positions": ("sine", 3, True),
            "max_positions": (*NOT_INTS, 0),
            "final_norm": ("yes", 2.5),
            "block_size": (*NOT_INTS, 1),
            "rotary_base": (*NOT_NUMBERS, 0.0),
            "num_kv_heads": ("2", 0, 2.5, 3),
        },
    ),
    "Session": (
        seqaccel.Session,
        lambda: {"module": nn.LSTM(I, H)},
        {
            "module": (
                None,
                "lstm",
                3,
                torch.nn.Conv1d(1, 1, 1),
                nn.LSTM(I, H, bidirectional=True),
                nn.LSTM(I, H).double(),
            ),
            "batch_size": (*NOT_INTS, 0, -1, True),
            "weights": ("float16", None, torch.float32),
        },
    ),
    "Session of a module that is traced": (
        seqaccel.Session,
        lambda: {"module": torch.nn.Conv1d(I, H, 1), "example": torch.zeros(1, I, 4)},
        {"example": (3, "x", torch.zeros(()), torch.zeros(0, I, 4), torch.zeros(1, I, 4).double())},
    ),
    "convert": (seqaccel.convert, lambda: {"model": nn.LSTM(I, H)}, {"model": (None, "m", 3, torch.nn.LSTM)}),
    "from_haste": (
        seqaccel.from_haste,
        lambda: {
            "source": {"kernel": torch.randn(3, 16), "recurrent_kernel": torch.randn(4, 16), "bias": torch.zeros(16)}
        },
        {"source": (None, 3, "w"), "zoneout": ("0.1", NAN, 2), "dropout": ("0.1", NAN, 2), "batch_first": NOT_FLAGS},
    ),
    "from_mingru": (
        seqaccel.from_mingru,
        lambda: {"source": {"to_hidden_and_gate.weight": torch.randn(8, 3)}},
        {"source": (None, 3, "w")},
    ),
    "from_qrnn": (
        seqaccel.from_qrnn,
        lambda: {"source": {"layers.0.linear.weight": torch.randn(12, 3), "layers.0.linear.bias": torch.zeros(12)}},
        {
            "source": (None, 3, "w"),
            "window": (0, 3, "1"),
            "zoneout": ("0.1", NAN, 2),
            "output_gate": NOT_FLAGS,
            "dropout": ("0.1", NAN, 2),
        },
    ),
    "from_mlstm": (
        seqaccel.from_mlstm,
        lambda: {
            "weights": {
                "wx": torch.randn(3, 16),
                "wh": torch.randn(4, 16),
                "wmx": torch.randn(3, 4),
                "wmh": torch.randn(4, 4),
                "b": torch.zeros(16),
            }
        },
        {"weights": (None, 3, "w"), "batch_first": NOT_FLAGS},
    ),
    "backend": (lambda name: seqaccel.backend(name).__enter__(), lambda: {"name": "auto"}, {"name": ("tpu", None, 3)}),
}
#: What torch's own words, or the package ``sru``'s, call an argument.
ALSO = {
    "bidirectional": "bidirectional",
    "n_proj": "projection_size",
    "num_channels": "num_channels",
    "name": "backend",
    "dim": "dim|Dimension",
    "state": "state|h_0|c_0",
    "hx": "hx|hidden|h_0|c_0|batch",
    "source": "source|weights",
    "a": "a|a and b",
    "c0": "c0|c_0|hidden size",
    "cu_seqlens": "cu_seqlens|a batch of 1",
    "attention_last_n_layers": "attention_last_n_layers",
    "memory_mask_pad": "memory_mask_pad",
}

#: Modules with the arguments of ``forward``, the streaming state, and an input of one step.
SRU_INPUT = {
    "input": TENSOR,
    "c0": OPTIONAL,
    "mask_pad": (*NOT_OPTIONAL_TENSORS, torch.zeros(T, B), torch.ones(2, dtype=torch.bool)),
    "reset": EPISODES,
}
HIDDEN = (torch.zeros(1), [torch.zeros(1, B, H)], 3, "h")
HIDDENS = ((), (torch.zeros(1, B, H),), (torch.zeros(1, B, H),) * 3, (None, None), "ab", 3, (torch.zeros(1),) * 2)
FORWARDS = {
    "RNN": (
        lambda: nn.RNN(I, H),
        {"input": torch.randn(T, B, I)},
        {"input": TENSOR, "hx": HIDDEN, "reset": RESETS},
    ),
    "GRU": (
        lambda: nn.GRU(I, H),
        {"input": torch.randn(T, B, I)},
        {"input": TENSOR, "hx": HIDDEN, "reset": RESETS},
    ),
    "LayerNormGRU": (
        lambda: nn.LayerNormGRU(I, H),
        {"input": torch.randn(T, B, I)},
        {"input": TENSOR, "hx": HIDDEN, "reset": RESETS},
    ),
    "LSTM": (
        lambda: nn.LSTM(I, H),
        {"input": torch.randn(T, B, I)},
        {"input": TENSOR, "hx": HIDDENS, "reset": RESETS},
    ),
    "PeepholeLSTM": (
        lambda: nn.PeepholeLSTM(I, H),
        {"input": torch.randn(T, B, I)},
        {"input": TENSOR, "hx": HIDDENS, "reset": RESETS},
    ),
    "CfC": (
        lambda: nn.CfC(I, H),
        {"input": torch.randn(T, B, I)},
        {"input": TENSOR, "hx": HIDDEN, "timespans": (*NOT_OPTIONAL_TENSORS, torch.ones(B)), "reset": RESETS},
    ),
    "CfCCell": (
        lambda: nn.CfCCell(I, H),
        {"input": torch.randn(B, I)},
        {"input": TENSOR, "hx": HIDDEN, "timespans": (*NOT_OPTIONAL_TENSORS, torch.ones(B + 1))},
    ),
    "LiGRU": (
        lambda: nn.LiGRU(I, H),
        {"input": torch.randn(T, B, I)},
        {"input": TENSOR, "hx": HIDDEN, "reset": RESETS},
    ),
    "EchoStateNetwork": (
        lambda: nn.EchoStateNetwork(I, H, 2),
        {"x": torch.randn(T, B, I)},
        {
            "x": TENSOR,
            "reset": RESETS,
            "state": ((), (torch.zeros(1, B, H),), (None,), (torch.zeros(B, H),) * 2, "h", 3),
        },
    ),
    "RNNCell": (
        lambda: nn.RNNCell(I, H),
        {"input": torch.randn(B, I)},
        {"input": TENSOR, "hx": (*HIDDEN, torch.zeros(2, H))},
    ),
    "GRUCell": (
        lambda: nn.GRUCell(I, H),
        {"input": torch.randn(B, I)},
        {"input": TENSOR, "hx": (*HIDDEN, torch.zeros(2, H))},
    ),
    "LSTMCell": (lambda: nn.LSTMCell(I, H), {"input": torch.randn(B, I)}, {"input": TENSOR, "hx": HIDDENS}),
    "SRU": (lambda: nn.SRU(I, H), {"input": torch.randn(T, B, I)}, SRU_INPUT),
    "SRUCell": (lambda: nn.SRUCell(I, H), {"input": torch.randn(T, B, I)}, SRU_INPUT),
    "SRUpp": (
        lambda: nn.SRUpp(I, H, 4),
        {"input": torch.randn(T, B, I)},
        {
            **SRU_INPUT,
            "attn_mask": OPTIONAL,
            "memory": (3, [torch.zeros(1)], [3, 3], [torch.zeros(1)] * 2),
            "memory_mask_pad": OPTIONAL,
        },
    ),
    **{
        name: (
            lambda name=name: getattr(nn, name)(I, H),
            {"input": torch.randn(T, B, I)},
            {
                "input": TENSOR,
                "hx": HIDDEN,
                "mask_pad": (*NOT_OPTIONAL_TENSORS, torch.zeros(T, B), torch.ones(2, dtype=torch.bool)),
                "reset": EPISODES,
                "cu_seqlens": (*NOT_OPTIONAL_TENSORS, torch.zeros(2), torch.tensor([0, T])),
            },
        )
        for name in ("QRNN", "MinGRU", "MinLSTM", "IndRNN")
    },
    "CausalConvTranspose1d": (
        lambda: nn.CausalConvTranspose1d(I, H, 3, stride=2),
        {"x": torch.randn(B, I, T)},
        {"x": TENSOR, "initial_state": OPTIONAL, "return_final_state": NOT_FLAGS, "reset": EPISODES},
    ),
    "CausalConv1d": (
        lambda: nn.CausalConv1d(I, H, 3),
        {"x": torch.randn(B, I, T)},
        {
            "x": TENSOR,
            "residual": OPTIONAL,
            "initial_state": OPTIONAL,
            "return_final_state": NOT_FLAGS,
            "reset": EPISODES,
            "cu_seqlens": (*NOT_OPTIONAL_TENSORS, torch.zeros(2), torch.tensor([0, T])),
            "dropout": NOT_NUMBERS,
            "output_activation": ("tanh",),
        },
    ),
    "TCN": (lambda: nn.TCN(I, [H]), {"x": torch.randn(B, I, T)}, {"x": TENSOR, "reset": EPISODES}),
    "WaveNetLayer": (
        lambda: nn.WaveNetLayer(I, H, condition_channels=2, global_channels=3),
        {"x": torch.randn(B, I, T), "condition": torch.randn(B, 2, T), "global_condition": torch.randn(B, 3)},
        {
            "x": TENSOR,
            "condition": (*TENSOR, torch.randn(B, 3, T)),
            "global_condition": (*TENSOR, torch.randn(B, 2)),
            "reset": EPISODES,
        },
    ),
    "WaveNet": (
        lambda: nn.WaveNet(I, layers=2),
        {"x": torch.randn(B, I, T)},
        {"x": (*TENSOR, torch.randn(B, T)), "condition": (3, torch.randn(B, 2, T)), "reset": EPISODES},
    ),
    "GatedConvLM": (
        lambda: nn.GatedConvLM(9, I, H, 1, 2),
        {"x": torch.zeros(B, T, dtype=torch.int64)},
        {"x": (*TENSOR, torch.zeros(T, dtype=torch.int64)), "reset": EPISODES},
    ),
    "AdditiveAttention": (
        lambda: nn.AdditiveAttention(I, I, 6),
        dict.fromkeys(("query", "key", "value"), torch.randn(B, T, I)),
        {
            "query": TENSOR,
            "key": TENSOR,
            "value": OPTIONAL,
            "mask": (*NOT_OPTIONAL_TENSORS, torch.ones(B, T), torch.ones(2, 3, dtype=torch.bool)),
            "need_weights": NOT_FLAGS,
        },
    ),
    "AttentionLSTMDecoder": (
        lambda: nn.AttentionLSTMDecoder(I, H, 4),
        {"input": torch.randn(B, T, I), "memory": torch.randn(B, 5, 4)},
        {
            "input": (*TENSOR, torch.randn(B, T)),
            "memory": (*TENSOR, torch.randn(B, 5, 3)),
            "hx": (3, (None, None), (torch.randn(1, B, H),), (torch.randn(1, B, H), torch.randn(B, H))),
            "memory_padding_mask": (*NOT_OPTIONAL_TENSORS, torch.zeros(2, 2, dtype=torch.bool)),
            "need_weights": NOT_FLAGS,
        },
    ),
    "GNMT": (
        lambda: nn.GNMT(5, 6, H, 2),
        {"source": torch.zeros(B, T, dtype=torch.int64), "target": torch.zeros(B, T, dtype=torch.int64)},
        {
            "source": (*TENSOR, torch.zeros(B, dtype=torch.int64), torch.zeros(B, 0, dtype=torch.int64)),
            "target": (*TENSOR, torch.zeros(B + 1, T, dtype=torch.int64)),
            "source_padding_mask": (*NOT_OPTIONAL_TENSORS, torch.zeros(2, 2, dtype=torch.bool)),
        },
    ),
    "MultiplicativeAttention": (
        lambda: nn.MultiplicativeAttention(I),
        dict.fromkeys(("query", "key", "value"), torch.randn(B, T, I)),
        {
            "query": TENSOR,
            "key": TENSOR,
            "value": OPTIONAL,
            "mask": (*NOT_OPTIONAL_TENSORS, torch.ones(B, T), torch.ones(2, 3, dtype=torch.bool)),
            "need_weights": NOT_FLAGS,
        },
    ),
    "BlockSparseAttention": (
        lambda: nn.BlockSparseAttention(8, 2, batch_first=True),
        dict.fromkeys(("query", "key", "value"), torch.randn(B, T, 8)),
        {
            "query": TENSOR,
            "key": TENSOR,
            "value": TENSOR,
            "key_padding_mask": (*NOT_OPTIONAL_TENSORS, torch.zeros(2, 2, dtype=torch.bool)),
            "attn_mask": (*NOT_OPTIONAL_TENSORS, torch.zeros(T, T)),
            "need_weights": (True,),
            "is_causal": NOT_FLAGS,
        },
    ),
    "NoveltyMemory": (
        lambda: nn.NoveltyMemory(8, 2, batch_first=True),
        dict.fromkeys(("query", "key", "value"), torch.randn(B, T, 8)),
        {
            "query": TENSOR,
            "key": TENSOR,
            "value": TENSOR,
            "key_padding_mask": (*NOT_OPTIONAL_TENSORS, torch.zeros(2, 2, dtype=torch.bool)),
            "attn_mask": (*NOT_OPTIONAL_TENSORS, torch.zeros(T, T)),
            "need_weights": (True,),
            "is_causal": NOT_FLAGS,
        },
    ),
    "HierarchicalAttention": (
        lambda: nn.HierarchicalAttention(8, 2, batch_first=True),
        dict.fromkeys(("query", "key", "value"), torch.randn(B, T, 8)),
        {
            "query": TENSOR,
            "key": TENSOR,
            "value": TENSOR,
            "key_padding_mask": (*NOT_OPTIONAL_TENSORS, torch.zeros(2, 2, dtype=torch.bool)),
            "attn_mask": (*NOT_OPTIONAL_TENSORS, torch.zeros(T, T)),
            "need_weights": (True,),
            "is_causal": NOT_FLAGS,
            "lengths": OPTIONAL,
            "cu_seqlens": OPTIONAL,
        },
    ),
    "HierarchicalAttentionEncoder": (
        lambda: nn.HierarchicalAttentionEncoder(8, 2, 1, 6, batch_first=True),
        {"src": torch.randn(B, T, 8)},
        {
            "src": (*TENSOR, torch.randn(B, T, 7)),
            "src_key_padding_mask": (*NOT_OPTIONAL_TENSORS, torch.zeros(2, 2, dtype=torch.bool)),
            "mask": (*NOT_OPTIONAL_TENSORS, torch.zeros(T, T)),
            "cu_seqlens": OPTIONAL,
            "is_causal": tuple(bad for bad in NOT_FLAGS if bad is not None),
        },
    ),
}
NOT_STATES = (None, 3, "state", (), (None,), torch.zeros(1))


def cases():
    for title, (function, valid, bad) in CALLS.items():
        for name, values in bad.items():
            for i, value in enumerate(values):
                yield pytest.param(function, valid, name, value, id=f"{title}-{name}-{i}")
    for title, (make, valid, bad) in FORWARDS.items():
        for name, values in bad.items():
            for i, value in enumerate(values):
                call = lambda make=make, **given: make()(**given)  # noqa: E731
                yield pytest.param(call, lambda valid=valid: valid, name, value, id=f"{title}()-{name}-{i}")


def refused(call, name):
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)) as caught:
        call()
    message = str(caught.value)
    assert re.search(rf"(?<![a-z])({ALSO.get(name, name)})(?![a-z])", message), message
    assert not re.search(r"/\w+/\w+|\.cpp|\.h:", message), message


@pytest.mark.parametrize("function, valid, name, value", cases())
def test_bad_argument(function, valid, name, value):
    given = valid()
    with torch.no_grad():
        refused(lambda: function(**{**given, name: value}), name)


def test_the_valid_calls_are_valid():
    for function, valid, _ in CALLS.values():
        function(**valid())
    for make, valid, _ in FORWARDS.values():
        make()(**valid)
    assert len(list(cases())) > 200


STREAMS = {name: FORWARDS[name][0] for name in ("RNN", "GRU", "LSTM", "SRU", "SRUpp", "MinGRU", "CausalConv1d", "TCN")}
STREAMS |= {"WaveNet": FORWARDS["WaveNet"][0], "WaveNetLayer": lambda: nn.WaveNetLayer(I, H)}
STREAMS["QRNN"] = lambda: nn.QRNN(I, H, window=2)
STREAMS["HierarchicalAttention"] = lambda: nn.HierarchicalAttention(I, 2)
STREAMS["HierarchicalAttentionEncoder"] = lambda: nn.HierarchicalAttentionEncoder(I, 2, 1, 6)
STREAMS["EchoStateNetwork"] = lambda: nn.EchoStateNetwork(I, H, 2)
STREAMS["NoveltyMemory"] = lambda: nn.NoveltyMemory(I, 2)
STREAMS["AttentionLSTMDecoder"] = lambda: nn.AttentionLSTMDecoder(I, H, 4)


@pytest.mark.parametrize("name", STREAMS)
def test_bad_streams(name):
    module = STREAMS[name]()
    reads_memory = name == "AttentionLSTMDecoder"
    state = module.init_state(torch.randn(B, 5, 4) if reads_memory else B)
    x_t = torch.randn(B, I)
    module.step(x_t, state)
    chunk = torch.randn(B, I, T) if name in ("CausalConv1d", "TCN", "WaveNet", "WaveNetLayer") else torch.randn(T, B, I)
    chunk = chunk.transpose(0, 1) if reads_memory else chunk
    module.extend(chunk, state)
    for bad in (*TENSOR, torch.randn(B, 5, 3)) if reads_memory else (2.5, "3", None, -1, True):
        refused(lambda bad=bad: module.init_state(bad), "memory" if reads_memory else "batch_size")
    for bad in TENSOR:
        refused(lambda bad=bad: module.step(bad, state), "x_t|x")
        refused(lambda bad=bad: module.extend(bad, state), "x|input")
    for bad in NOT_STATES:
        refused(lambda bad=bad: module.step(x_t, bad), "state|history|hidden")
        refused(lambda bad=bad: module.extend(chunk, bad), "state|history|hidden")
    for bad in NOT_STATES[:-1]:
        refused(lambda bad=bad: module.reset(bad, torch.ones(B, dtype=torch.bool)), "state")
        refused(lambda bad=bad: module.select(bad, torch.zeros(B, dtype=torch.int64)), "state")
    for bad in (None, [True] * B, 3, torch.ones(B), torch.ones(B + 1, dtype=torch.bool)):
        refused(lambda bad=bad: module.reset(state, bad), "mask")
    for bad in (None, [0, 1, 2], 3, torch.ones(B), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0, B])):
        refused(lambda bad=bad: module.select(state, bad), "indices")


def test_bad_session_calls():
    session = seqaccel.Session(nn.LSTM(I, H), batch_size=B)
    for bad in (*TENSOR, torch.zeros(B, I, dtype=torch.float64), torch.zeros(B, I, device="meta")):
        refused(lambda bad=bad: session.step(bad), "x_t|x")
        refused(lambda bad=bad: session.extend(bad), "x")
    for bad in ([True] * B, 3, "m", torch.ones(B), torch.ones(B + 1, dtype=torch.bool)):
        refused(lambda bad=bad: session.reset(bad), "mask")
    for bad in (None, [0, 1, 2], 3, torch.ones(B), torch.tensor([0, B, 0]), torch.tensor([0])):
        refused(lambda bad=bad: session.select(bad), "indices")
    for bad in (*NOT_INTS, 0, -1, True):
        refused(lambda bad=bad: session.fork(bad), "batch_size")
    before = session.state_dict()
    good = {key: torch.ones_like(value) for key, value in before.items()}
    for bad in (
        None,
        3,
        {},
        {"h": good["h"]},
        {**good, "c": None},
        {**good, "c": [1.0]},
        {**good, "c": good["c"][0]},
        {**good, "c": good["c"].to("meta")},
        {**good, "c": good["c"] * 1j},
    ):
        refused(lambda bad=bad: session.load_state_dict(bad), "state_dict")
        assert all(torch.equal(value, before[key]) for key, value in session.state_dict().items())
