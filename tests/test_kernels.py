# SPDX-License-Identifier: MIT
"""Every row of every kernel table on every case that it accepts, against the definition and against torch."""

import functools
import itertools
import re
from dataclasses import replace

import problems
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import (
    DTYPES,
    LAYOUTS,
    PROBLEMS,
    ROWS,
    AvgPool,
    Backend,
    Chain,
    Conv,
    Linear,
    Norm,
    Numbers,
    Pool,
    Problem,
    Rejected,
    attempt,
    forced,
    in_tf32,
    on_backends,
    row_parameters,
    to_tf32,
)
from simt import backend as simt

import fastconv
from fastconv import functional as G
from fastconv import kernels, ops

# Sizes around the tiles of the block GEMM: micro-tiles of 4, 6 and 8 rows by 8, 16 and 48 columns (half as
# many in float64), blocks of 120 x 192 by 192 deep; around CUDA's 64 x 64 and 64 x 16; primes.
EDGES = [
    (3, 7, 5),
    (4, 8, 6),
    (5, 9, 7),
    (6, 15, 8),
    (7, 16, 9),
    (8, 17, 15),
    (9, 23, 16),
    (13, 24, 17),
    (23, 25, 11),
    (31, 47, 13),
    (32, 48, 29),
    (33, 49, 31),
    (63, 64, 65),
    (64, 65, 63),
    (65, 63, 64),
    (119, 192, 193),
    (120, 193, 191),
    (121, 191, 192),
    (191, 120, 121),
    (193, 121, 119),
]

CONVS = [
    *(Conv(1, c, k, (1, width), 1) for k, width, c in EDGES),
    # LeNet's
    Conv(3, 1, 6, (32, 32), 5),
    Conv(2, 6, 16, (14, 14), 5),
    Conv(2, 1, 6, (28, 28), 5, padding=2),
    # strides, paddings, dilations
    Conv(2, 3, 5, (11, 13), 3, stride=2, padding=1),
    Conv(2, 3, 5, (12, 13), 3, stride=(3, 2), padding=(2, 1, 2, 1), dilation=(1, 2)),
    Conv(2, 4, 3, (13, 12), (3, 2), stride=(1, 4), padding=(0, 1, 2, 0), dilation=(3, 1)),
    Conv(2, 3, 4, (9, 7), 2, stride=5, padding=1),
    Conv(1, 2, 3, (7, 8), 3, stride=3, padding=4),
    Conv(2, 3, 4, (9, 8), (4, 2), padding="same"),
    Conv(2, 3, 4, (9, 8), (2, 5), padding="same", dilation=(3, 2), bias=False),
    Conv(1, 2, 2, (5, 5), 3, padding=(0, 3, 5, 1)),
    # dgrad by phases: taps next to each other and apart, none; more inputs than outputs reach, behind padding
    Conv(2, 3, 4, (9, 11), 4, stride=3, padding=(2, 1, 0, 3), dilation=2, pool=None),
    Conv(1, 2, 5, (14, 13), (3, 2), stride=(4, 2), padding=(1, 0, 2, 3), dilation=(6, 3), pool=None),
    Conv(1, 8, 8, (11, 11), 3, stride=3, padding=(3, 3, 0, 0), pool=None),
    # groups, depthwise
    Conv(2, 6, 9, (8, 9), 3, padding=1, groups=3),
    Conv(2, 7, 7, (9, 8), 3, stride=2, padding=1, groups=7),
    Conv(2, 5, 15, (8, 7), (3, 1), groups=5, dilation=2, bias=False),
    # channels in lanes: whole blocks and a rest, where they are and copied
    Conv(2, 35, 35, (8, 9), 3, padding=1, groups=35),
    Conv(1, 19, 19, (12, 11), 5, stride=2, padding=2, groups=19),
    # tiles of a row in place: one, several and an overlap, with each filter, more blocks than go at once
    Conv(1, 147, 147, (3, 7), 3, padding=1, groups=147, pool=None),
    Conv(1, 17, 17, (5, 16), (3, 5), padding=(1, 4, 0, 4), groups=17, pool=None),
    Conv(2, 16, 16, (4, 29), 3, stride=2, padding=(1, 0, 0, 2), dilation=(2, 1), groups=16, pool=None),
    Conv(1, 16, 16, (6, 15), 7, stride=(1, 2), padding=3, groups=16, pool=None),
    Conv(1, 16, 16, (6, 21), (7, 5), stride=(2, 2), padding=2, groups=16, pool=None),
    Conv(1, 16, 16, (8, 15), 7, padding=3, groups=16, pool=None),
    # planes in lanes: each filter, one vector and more in a row, a tile and more of rows, bands, outputs that
    # share an input
    Conv(1, 2, 2, (270, 3), 3, padding=1, groups=2, pool=None),
    Conv(1, 3, 3, (15, 75), 3, padding=(0, 1, 2, 0), groups=3, pool=None),
    Conv(1, 2, 4, (9, 40), 5, padding=(2, 1, 2, 3), groups=2, pool=None),
    Conv(2, 2, 2, (9, 20), 7, padding=(3, 6, 3, 0), groups=2, pool=None),
    # slabs: more channels than a block holds, on either side; rows of more pixels than lanes
    Conv(1, 3, 261, (5, 6), 3, pool=None),
    Conv(1, 43, 9, (4, 5), 3, padding=1, pool=None),
    Conv(1, 17, 9, (4, 19), (1, 3), stride=(1, 2), padding=(0, 1, 0, 1)),
    Conv(3, 16, 16, (9, 10), 3, pool=None),  # sums of 144: long for float64
    # tiles of pixels and output channels: of one and two vectors, wide, narrow, with a rest; several bands;
    # long sums, alone and with padding; channels that fall into the same sets of the cache
    Conv(1, 5, 49, (2, 29), (1, 2), pool=None),
    Conv(1, 2, 33, (17, 30), (2, 3), stride=(2, 1), padding=(1, 1, 0, 1), pool=None),
    Conv(1, 300, 17, (3, 5), (2, 3), padding=1, pool=None),
    Conv(1, 512, 3, (2, 4), (1, 2), dilation=2, pool=None),
    Conv(1, 3, 512, (2, 4), (1, 2), dilation=2, pool=None),
    # Winograd's tiles: one, a run and more in a row, wider than a task in each direction, with a rest; rows
    # and images that two tasks share; groups; channels and outputs in parts; pieces of several tasks
    Conv(1, 90, 261, (3, 3), 3, pool=None),
    Conv(1, 17, 16, (2, 34), 3, padding=1, pool=None),
    Conv(3, 17, 16, (9, 10), 3, padding=1, pool=None),
    Conv(1, 16, 3, (1, 110), 3, padding=1, pool=None),
    Conv(1, 2, 16, (1, 110), 3, padding=1, pool=None),
    Conv(1, 18, 17, (5, 6), 3, padding=(2, 1, 0, 2), pool=None),
    Conv(1, 32, 34, (4, 5), 3, padding=1, groups=2, pool=None),
    Conv(1, 130, 16, (1, 2), 3, padding=1, pool=None),
    Conv(1, 16, 50, (4, 5), 3, padding=1, pool=None),
    Conv(1, 16, 1, (1, 1633), 3, padding=1, pool=None),
    # 1x1, filters as large as the input, one output
    Conv(3, 17, 13, (6, 7), 1, stride=2, pool=(3, 2, 1)),
    Conv(25, 4, 24, (5, 6), (5, 6), pool=None),
    Conv(20, 3, 33, (3, 3), 5, padding=1, pool=None),
    # batches: none, one, and enough for the weight gradient's sum to be cut in pieces
    Conv(0, 3, 4, (6, 5), 3),
    Conv(1, 3, 4, (6, 5), 3, pool=(1, 2, 0)),
    Conv(5, 2, 3, (19, 19), 3, pool=(3, 1, 1)),
    Conv(13, 1, 2, (19, 21), 3, padding=1, pool=(3, 3, 0)),
    # more images than lanes; bands of rows that share a pooling window or a filter row
    Conv(17, 3, 7, (9, 10), 3, padding=1),
    Conv(33, 2, 5, (10, 9), 3, stride=2, padding=1, pool=(3, 2, 1)),
    Conv(1, 3, 8, (66, 70), 3, padding=1, pool=(3, 2, 1)),
    Conv(2, 2, 8, (64, 61), 5, stride=(1, 2), padding=2),
    # outputs of whole vectors along rows and channels
    Conv(1, 1, 2, (3, 16), 3, padding=1, pool=None),
    Conv(1, 2, 4, (4, 32), 3, padding=1),
    Conv(1, 1, 8, (5, 16), 3, padding=1, pool=(3, 2, 1)),
    # CUDA's direct kernels: both patches, columns in two blocks, channels in parts, images that share a block
    # and leave a rest, sums over several chunks
    Conv(1, 1, 6, (28, 28), 3, padding=1),
    Conv(1, 2, 7, (3, 70), 3, padding=1),
    Conv(1, 1, 20, (2, 64), 5, padding=2),
    Conv(5, 67, 67, (6, 5), 3, padding=1, groups=67),
    Conv(1101, 1, 1, (2, 2), 3, padding=1),
    # and their 3x3/2 pools: planes even and odd, both patches, blocks of rows and of columns, images that
    # share a block, channels in parts, threads that share a patch, groups
    Conv(1, 1, 6, (28, 28), 3, padding=1, pool=(3, 2, 0)),
    Conv(1, 2, 7, (7, 70), 3, padding=1, pool=(3, 2, 1)),
    Conv(33, 3, 5, (9, 8), 5, padding=2, pool=(3, 2, 0)),
    Conv(2, 16, 20, (8, 9), 3, padding=1, pool=(3, 2, 1), bias=False),
    Conv(3, 6, 8, (8, 9), 3, groups=2, pool=(3, 2, 0)),
    Conv(2, 3, 8, (12, 13), 5, padding=(2, 1, 0, 2), pool=(3, 2, 1)),
    # CUDA's depthwise kernels: channels, columns and rows in several blocks with rests, each filter, channels
    # in vectors; dgrad where no tap reaches some rows, and where several channels are summed; a large filter;
    # an image of one row
    Conv(1, 36, 36, (15, 17), 3, padding=1, groups=36, pool=None),
    Conv(1, 8, 8, (9, 18), 3, stride=2, padding=1, groups=8, pool=None),
    Conv(2, 12, 12, (9, 10), 5, padding=2, groups=12, pool=None),
    Conv(1, 8, 8, (11, 9), 5, stride=2, padding=2, groups=8, pool=None),
    Conv(1, 4, 4, (7, 66), 7, padding=3, groups=4, pool=None),
    Conv(1, 4, 8, (5, 6), 3, stride=(2, 3), padding=1, groups=4, pool=None),
    Conv(1, 3, 3, (7, 5), 2, stride=(4, 1), groups=3, pool=None),
    Conv(1, 2, 2, (8, 5), (31, 31), padding=15, groups=2, pool=None),
    Conv(2, 4, 4, (29,), 5, padding=2, groups=4, pool=None),
    # one and three axes
    Conv(2, 3, 5, (29,), 4, stride=3, padding=(2, 1)),
    Conv(3, 4, 6, (17,), 3, dilation=2, groups=2, padding="same"),
    Conv(2, 2, 4, (5, 6, 7), (2, 3, 2), stride=(1, 2, 1), padding="same"),
    Conv(1, 4, 4, (6, 5, 7), 3, stride=2, padding=1, dilation=(1, 2, 1), groups=2, pool=None),
    # one cell deep, and that cell is padding
    Conv(2, 2, 3, (1, 4, 5), (1, 2, 3), stride=(3, 1, 1), padding=(1, 0, 0, 1, 0, 0), pool=None),
]

POOLS = [
    Pool(3, 6, (28, 28), 2),
    Pool(2, 16, (10, 10), 2),
    Pool(2, 3, (11, 13), 3, 2, 1),
    Pool(2, 3, (11, 13), 3, 1, 1),
    Pool(2, 17, (9, 8), (3, 2), (2, 1), (1, 0), ceil=True),
    Pool(2, 3, (12, 11), 2, 3, 1, ceil=True),
    Pool(1, 5, (13, 12), (2, 3), (1, 2), 1, (3, 2)),
    Pool(2, 2, (6, 9), 1, 2),
    Pool(2, 3, (7, 5), (7, 5)),
    Pool(0, 3, (6, 6), 2),
    Pool(1, 1, (40, 41), 17, 5, 8),  # 289 cells: offsets are int32
    Pool(1, 2, (20, 20), (15, 17), 3),  # 255 cells: the most that uint8 holds
    Pool(1, 2, (3, 1023), 3, 2, 1),
    Pool(1, 1, (2, 2100), 2),  # wider than a stretch of the row kernels
    Pool(1, 1030, (3, 4), 2, 1),
    # rows and channels of whole vectors, for CUDA's runs: each window, in two widths
    *(
        Pool(1, 3, size, *window)
        for window in ((2,), (3, 2, 1), (3, 2))
        for size in ((6, 32), (5, 33), (3, 48))
    ),
    Pool(1, 3, (5, 24), 3, 1, 1),
    Pool(1, 3, (4, 32), 3, 1, 1),
    Pool(2, 16, (6, 7), 3, 2, 1),
    Pool(2, 16, (7, 6), 3, 1, 1),
    Pool(1, 8, (9, 8), (3, 2), (2, 1), (1, 0), (1, 2)),
    Pool(1, 8, (18, 19), 17, 5, 8),
    Pool(2, 3, (31,), 3, 2, 1),
    # narrow planes, several bands, wide strides, few channels in channels_last
    Pool(5, 7, (10, 10), 2),
    Pool(3, 5, (14, 15), 3, 1, 1),
    Pool(4, 3, (33, 32), 2, 1, 1),
    Pool(2, 2, (60, 131), 3, 2, 1),
    Pool(1, 2, (130, 67), 2),
    Pool(2, 3, (17, 19), (2, 3), (3, 4), 1),
    Pool(1, 3, (4, 7000), (3, 5), (1, 3), (1, 2)),
    Pool(2, 33, (7, 9), 3, 2, 1),
    Pool(1, 2, (129, 5), (129, 2), 1),  # more rows than the row kernels take
    Pool(2, 3, (5, 6, 7), (2, 3, 2), 2, 1, ceil=True),
    Pool(1, 2, (5, 7, 6), 2, 1, 0, (2, 3, 1)),
]

AVG_POOLS = [
    AvgPool(3, 6, (28, 28), 2),
    AvgPool(2, 16, (10, 10), 2),
    AvgPool(2, 3, (11, 13), 3, 2, 1),
    AvgPool(2, 3, (11, 13), 3, 2, 1, count_include_pad=False),
    AvgPool(2, 3, (11, 13), 3, 1, 1, divisor=-7),
    AvgPool(2, 17, (9, 8), (3, 2), (2, 1), (1, 0), ceil=True),
    AvgPool(2, 17, (9, 8), (3, 2), (2, 1), (1, 0), ceil=True, count_include_pad=False),
    AvgPool(2, 3, (12, 11), 2, 3, 1, ceil=True),
    AvgPool(2, 2, (6, 9), 1, 2),
    AvgPool(2, 8, (7, 7), 7),
    AvgPool(0, 3, (6, 6), 2),
    AvgPool(1, 1, (40, 41), 17, 5, 8),
    AvgPool(1, 1, (2, 2100), 2),
    AvgPool(1, 1030, (3, 4), 2, 1),
    # rows and channels of whole vectors, for CUDA's runs: each window, in two widths
    AvgPool(1, 3, (6, 32), 2),
    AvgPool(1, 3, (5, 33), 2),
    AvgPool(1, 3, (6, 32), 3, 2, 1),
    AvgPool(1, 3, (3, 48), 3, 2),
    AvgPool(1, 3, (5, 24), 3, 1, 1, count_include_pad=False),
    AvgPool(2, 16, (6, 7), 3, 2, 1, count_include_pad=False),
    AvgPool(2, 16, (7, 6), 3, 1, 1),
    AvgPool(2, 16, (8, 8), 2, divisor=3),
    AvgPool(2, 3, (31,), 3, 2, 1),
    AvgPool(2, 3, (31,), 3, 2, 1, divisor=5),
    # narrow planes, several bands, wide strides, few channels in channels_last
    AvgPool(5, 7, (10, 10), 2),
    AvgPool(2, 2, (60, 131), 3, 2, 1),
    AvgPool(1, 2, (130, 67), 2),
    AvgPool(2, 3, (17, 19), (2, 3), (3, 4), 1, count_include_pad=False),
    AvgPool(1, 2, (129, 5), (129, 2), 1),  # more rows than the row kernels take
    AvgPool(2, 3, (5, 6, 7), (2, 3, 2), 2, 1, ceil=True),
    AvgPool(1, 2, (5, 7, 6), 2, 1, 1, count_include_pad=False),
]

NORMS = [
    # FashionCNN's; around vectors of windows and channels, odd heights and widths, few channels cut in pieces
    Norm(3, 8, (28, 28)),
    Norm(2, 16, (12, 12)),
    Norm(2, 3, (7, 9)),
    Norm(2, 17, (6, 31)),
    Norm(1, 16, (3, 32)),
    Norm(1, 15, (2, 33)),
    Norm(1, 2, (5, 35)),
    Norm(20, 1, (4, 66)),
    Norm(2, 33, (9, 8)),
    Norm(2, 5, (6, 6), affine=False),
    Norm(2, 5, (7, 8), act="none"),
    Norm(3, 4, (12, 12), mean=1e4),
    # nothing pools
    Norm(3, 5, (4, 5), None),
    Norm(2, 17, (7, 16), None),
    Norm(1, 3, (3, 33), None, act="none"),
    Norm(20, 2, (5, 8), None, affine=False, mean=-300),
    # CUDA's slices: several, of cells and of channels, which fill several blocks
    Norm(9, 2, (44, 44), None),
    Norm(4, 72, (12, 13), None),
    Norm(2, 4, (6, 8), None, mean=1e4),
    # other windows, one axis and three
    Norm(2, 3, (9, 8), (3, 2, 1)),
    Norm(2, 8, (6, 7), (3, 1, 1)),
    Norm(3, 2, (6, 5), (1, 1, 0)),
    Norm(2, 3, (8, 7), ((2, 3), (1, 2), (0, 1)), act="none"),
    Norm(1, 2, (20, 20), (17, 5, 8)),  # offsets are int32
    Norm(2, 3, (31,)),
    Norm(2, 3, (31,), None),
    Norm(2, 3, (4, 5, 6), ((2, 2, 2), (1, 2, 2), (0, 0, 1))),
    Norm(2, 3, (3, 4, 5), None),
]

LINEARS = [
    *(Linear((m,), n, k) for m, n, k in EDGES),
    Linear((64,), 120, 400),
    Linear((64,), 84, 120),
    Linear((64,), 10, 84),
    Linear((1,), 330, 500),
    # around the panels and row tiles, operands in place and packed, and the dot product's tiles
    Linear((1,), 17, 400),
    Linear((2,), 10, 84),
    Linear((5,), 97, 33),
    Linear((16,), 50, 47),
    Linear((17,), 129, 200),
    Linear((30,), 9, 16),
    Linear((241,), 25, 20),
    Linear((250,), 11, 390),
    Linear((2, 3, 5), 7, 11, bias=False),
    Linear((), 400, 60),
    Linear((4, 0), 3, 5),
    Linear((7,), 5, 0),
    Linear((900,), 8, 9),
]

POOL = {"pool": (2, 2, 0)}
CHAINS = [
    # LeNet, more images than lanes
    Chain.of(17, 1, (32, 32), [(6, 5, POOL), (16, 5, POOL)], (120, 84, 10)),
    # padding between the stages, strides, dilation, groups; windows of every kind; odd sizes
    Chain.of(3, 2, (11, 9), [(4, 3, {"padding": 1, **POOL}), (6, 3, {"padding": "same", "groups": 2})], (7,)),
    Chain.of(
        2, 3, (13, 12), [(5, 3, {"stride": 2, "padding": 1, "pool": (3, 2, 1)}), (3, 2, {"padding": 2})]
    ),
    Chain.of(
        5, 1, (10, 11), [(7, 3, {"pool": (3, 1, 1)}), (4, 2, {"dilation": 2, "stride": (1, 2)})], (5, 3)
    ),
    Chain.of(2, 2, (9, 8), [(3, 2, {"padding": (0, 1, 2, 0)})], relu=True),
    Chain.of(2, 1, (40, 40), [(2, 3, {"pool": (17, 5, 8)})], (3,)),  # offsets are int32
    Chain.of(33, 1, (6, 7), [(3, 3, POOL)], (5,), bias=False),
    Chain.of(0, 1, (6, 7), [(3, 3, POOL)], (5,)),
    # LeNet at 28 x 28; three channels, odd widths
    Chain.of(3, 1, (28, 28), [(6, 5, {"padding": 2, **POOL}), (16, 5, POOL)], (120, 84, 10)),
    Chain.of(9, 3, (13, 15), [(7, 5, POOL), (11, 3, POOL)], (13,)),
    # 3x3/2 pools in front of a convolution and of a linear layer; a convolution at the end
    Chain.of(2, 2, (12, 11), [(3, 3, {"padding": 1, "pool": (3, 2, 1)}), (5, 3, {"pool": (3, 2, 0)})], (4,)),
    Chain.of(2, 2, (9, 10), [(4, 3, {"padding": 1, **POOL}), (6, 3, {"padding": 1})]),
    # a filter in parts; images that share a block and leave a rest, in either patch of CUDA's
    Chain.of(1, 40, (5, 5), [(40, 3, {"padding": 1})], (3,)),
    Chain.of(269, 1, (6, 7), [(3, 3, POOL)], (5,)),
    Chain.of(403, 1, (8, 10), [(6, 3, {"padding": 1, **POOL})], (3,)),
    # linear layers alone, around the tiles of outputs and features, and of images
    Chain((), (31, 17, 9), 20, 47, relu=True),
    Chain((), (9, 4), 1203, 12),
    Chain((), (48,), 1, 16, bias=False),
    Chain((), (7, 65), 18, 150),
]

CASES = {
    "conv": CONVS,
    "conv_act_pool": CONVS,
    "max_pool": POOLS,
    "avg_pool": AVG_POOLS,
    "norm_act_pool": NORMS,
    "linear": LINEARS,
    "linear_act": LINEARS,
    "chain": CHAINS,
}


# One small problem an op, for what is tried in all combinations.
SMALL = {
    "conv": Conv(2, 3, 5, (7, 6), 3, stride=(2, 1), padding=1),
    "conv_act_pool": Conv(2, 3, 5, (7, 6), 3, padding=1, pool=(3, 2, 1)),
    "max_pool": Pool(2, 3, (7, 6), 3, 2, 1),
    "avg_pool": AvgPool(2, 3, (7, 6), 3, 2, 1, True, False),
    "norm_act_pool": Norm(2, 3, (7, 6)),
    "linear": Linear((5,), 7, 19),
    "linear_act": Linear((5,), 7, 19),
    "chain": Chain.of(3, 1, (7, 6), [(2, 3, {"padding": 1, **POOL})], (4, 3)),
}


# What tensor cores take as runs of 16 bytes, in one of these layouts or in both, around their tiles of 128,
# 64 and 32 by 128 bytes; sums in slices, whole and with a rest.
RUNS = {
    "conv": [
        Conv(2, 16, 24, (7, 9), 3, padding=1),
        Conv(1, 40, 136, (1, 136), 1, pool=None),
        Conv(3, 16, 48, (5, 6), 3, stride=2, padding=2, dilation=2, groups=2, pool=None),
        Conv(2, 16, 40, (10, 9), 4, stride=3, padding=(2, 1, 0, 3), dilation=2, pool=None),
        Conv(1, 8, 8, (11, 11), 3, stride=3, padding=(3, 3, 0, 0), pool=None),
        Conv(2, 16, 8, (16, 16), 1, stride=2, pool=None),
        Conv(9, 8, 8, (8, 8), (3, 5), padding=(1, 2, 1, 2), pool=None),
        Conv(1, 72, 8, (3, 4), 3, stride=(1, 2), padding=1, pool=None),
    ],
    "linear": [Linear((72,), 136, 40), Linear((24,), 8, 536), Linear((520,), 24, 8)],
}


def each_row_and_dtype():
    """Test parameters; rows of one table and dtype follow each other, so that they share their problems."""
    for table, dtype in itertools.product(PROBLEMS, DTYPES):
        for row in ROWS:
            if (row["op"], row["pass_"]) == table and dtype in row["dtypes"]:
                yield from on_backends(row, dtype)


@functools.lru_cache(maxsize=512)
def problem(op, pass_, case, numbers):
    """Of kind "tf32": of normal numbers, with torch's error in TF32, of factors rounded by 2^-11 of each.

    On a CPU, where torch has no TF32, it is given rounded ones.
    """
    made = PROBLEMS[op, pass_](case, numbers)
    if numbers.kind != "tf32":
        return made
    normal = PROBLEMS[op, pass_](case, replace(numbers, kind="normal"))
    return replace(normal, by_torch=made.by_torch) if numbers.device == "cpu" else normal


def by_error_rule(row):
    """The kind of a problem's numbers on which a row has to keep the error rule."""
    return "tf32" if in_tf32(row["name"]) else "normal"


def native_runs(row, dtype, device):
    """(case, numbers) to be tried on hardware: each case in every layout in float32, and by the error rule.

    The dtypes share the code that walks the strides.
    """
    kind = by_error_rule(row)
    fillings = [Numbers(kind, DTYPES[dtype], each, device) for each in ("contiguous", "channels_last")]
    for layout in LAYOUTS if dtype == "float32" else ("sliced",):
        fillings.append(Numbers("whole", DTYPES[dtype], layout, device))
    return [(case, numbers) for numbers in fillings for case in CASES[row["op"]]]


def aarch64_runs(row, dtype):
    """(case, numbers, order) to be tried under qemu: each case exactly and by the error rule, in turn in each
    layout and order."""
    layouts = list(LAYOUTS)
    for i, case in enumerate(CASES[row["op"]], list(DTYPES).index(dtype)):
        for kind, layout in {"whole": layouts[i % 5], "normal": layouts[i % 2]}.items():
            yield case, Numbers(kind, DTYPES[dtype], layout), simt.ORDERS[i % 3]


def multiply_adds(case):
    """The multiply-adds of a case, as far as it has any."""
    if isinstance(case, Linear):
        return torch.Size(case.rows).numel() * case.n * case.k
    if isinstance(case, Chain):
        linear = sum(torch.Size(size).numel() for size in case.weight_sizes[len(case.convs) :])
        return sum(map(multiply_adds, case.convs)) + case.input_size[0] * linear
    if isinstance(case, Conv):
        return torch.Size(case.output_size).numel() * torch.Size(case.weight_size[1:]).numel()
    return 0


def emulated_runs(row, dtype, in_full):
    """(case, numbers, order) to be tried on the emulator, where a multiply-add takes a microsecond.

    A case has each dtype, each in a layout and a thread order. Rows with tiles have it in every other dtype,
    for the dtypes share the code that gathers; so have naive rows, which know no layout from another, and
    composed ones, whose kernels are rows of their own. One with much work is in a single dtype, and those two
    are spared it. In full it has the dtypes that it lacks otherwise, with much work one more, and where it is
    small all layouts.
    """
    layouts, place, name = list(LAYOUTS), list(DTYPES).index(dtype), row["name"]
    is_spared, has_tiles = name.endswith(("_naive", "_composed")), "_tiled_" in name or "_mma_" in name
    every = 2 if has_tiles or is_spared else 1
    if "_mma_" in name and dtype == "float32":
        every = 4  # it is thrice the work
    for i, case in enumerate(CASES[row["op"]], place):
        work = multiply_adds(case)
        if in_full and work <= 20_000 and not is_spared:
            chosen = layouts
        elif work > (100_000 if is_spared else 500_000):
            turns = [2] if len(row["dtypes"]) > 1 else [1, 2, 3]  # of four; the first is not in full
            turn = (i - 2 * place) % 4 in (turns if in_full else [0])
            chosen = [layouts[i % 5]] if turn and not is_spared else []
        else:
            chosen = [layouts[(i + in_full) % 5]] if (i % every > 0) == in_full else []
        for j, layout in enumerate(chosen, i):
            yield case, Numbers("whole", DTYPES[dtype], layout), simt.ORDERS[j % 3]
    kinds = ("whole", by_error_rule(row))
    for kind, chosen in zip(kinds, (layouts, layouts[:2]), strict=True):
        for i, layout in enumerate(chosen):
            yield SMALL[row["op"]], Numbers(kind, DTYPES[dtype], layout), simt.ORDERS[i % 3]
    if "_mma_" in row["name"]:
        both = ("contiguous", "channels_last" if row["op"] == "conv" else "transposed")
        for i, (case, layout) in enumerate(itertools.product(RUNS[row["op"]], both), place):
            yield case, Numbers(kinds[i // 2 % 2], DTYPES[dtype], layout), simt.ORDERS[i % 3]


def check(row, backend, runs):
    """Fails with all that is wrong; skips where the processor or GPU is too old for the row."""
    wrong, reasons, accepted = [], set(), 0
    for case, numbers, *order in runs:
        each = problem(row["op"], row["pass_"], case, numbers)
        if backend.emulator:
            (backend.emulator.order,) = order
        try:
            found = list(each.wrong(attempt(row["name"], each), numbers))
        except Rejected as reason:
            reasons.add(str(reason))
            continue
        except RuntimeError as error:  # from the emulator: what its checker found
            found = [str(error)]
        accepted += 1
        wrong += [": ".join((sentence, ", ".join(map(str, (case, numbers, *order))))) for sentence in found]
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong[:20])
    if not accepted and all(reason.startswith("needs a ") for reason in reasons):
        pytest.skip(f"{row['name']} {reasons.pop()}")
    assert accepted, f"no case was accepted: {reasons}"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("row", "dtype", "backend"), list(each_row_and_dtype()), indirect=["backend"])
def test_row(row, dtype, backend, threads):
    threads(1)  # the problems are small, and test_same_bits shows that the number of threads changes nothing
    if backend.name == "emulator":
        check(row, backend, emulated_runs(row, dtype, in_full=False))
    elif backend.name == "aarch64":
        check(row, backend, aarch64_runs(row, dtype))
    else:
        check(row, backend, native_runs(row, dtype, backend.device))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row["name"]) for row in ROWS if row["device"] == "cuda"]
)
def test_row_in_full(row, dtype, emulator, threads):
    if dtype not in row["dtypes"]:
        pytest.skip(f"{row['name']} has no {dtype}")
    threads(1)
    check(row, Backend("emulator", emulator), emulated_runs(row, dtype, in_full=True))


@pytest.mark.parametrize(
    ("row", "backend"),
    [each for row in ROWS if in_tf32(row["name"]) for each in on_backends(row)],
    indirect=["backend"],
)
def test_tf32_rows_round_each_factor_once(row, backend):
    """The bits are those of numbers that were rounded to TF32 before."""
    op, pass_ = row["op"], row["pass_"]
    layout = "channels_last" if op == "conv" else "contiguous"
    for case in RUNS[op][0], SMALL[op]:
        case = replace(case, bias=False)  # a bias and its gradient are not rounded
        kinds = [
            PROBLEMS[op, pass_](case, Numbers(kind, torch.float32, layout, backend.device))
            for kind in ("normal", "tf32")
        ]
        try:
            ours, rounded = (attempt(row["name"], each) for each in kinds)
        except Rejected as reason:
            assert case.c % 4 if op == "conv" else case.k % 4, reason
            continue
        assert ours and all(torch.equal(ours[name], rounded[name]) for name in ours)
        assert not torch.equal(*(each.by_torch()[name] for each in kinds for name in [*ours][:1]))


@pytest.mark.usefixtures("poisoned_memory")
def test_memory_is_poisoned():
    """What the extension allocates is filled, and so test_row sees an element that is not written."""
    x, w = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 3)
    with torch.profiler.profile() as profile:
        ops.conv_fprop(x, w, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "")
    names = [event.name for event in profile.events()]
    assert names.index("aten::empty") < names.index("aten::fill_")
    assert torch.empty(3).isnan().all()


# --- any shape ----------------------------------------------------------------------------------------------

small = st.integers(1, 4)


@st.composite
def convs(draw):
    axes = draw(st.integers(1, 3))

    def each(values):
        return tuple(draw(st.lists(values, min_size=axes, max_size=axes)))

    kernel, stride, dilation, groups = each(small), each(small), each(small), draw(small)
    fronts, backs = each(st.integers(0, 5)), each(st.integers(0, 5))
    room = each(st.integers(0, 9))
    size = tuple(
        max(1, d * (k - 1) + 1 - front - back + more)
        for k, d, front, back, more in zip(kernel, dilation, fronts, backs, room, strict=True)
    )
    return Conv(
        draw(st.integers(0, 3)),
        groups * draw(small),
        groups * draw(st.integers(1, 9)),
        size,
        kernel,
        stride,
        (*fronts, *backs),
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.one_of(st.none(), st.tuples(small, small, st.integers(0, 2)))),
    )


@st.composite
def pools(draw):
    axes = draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[small] * axes))
    dilation = draw(st.tuples(*[small] * axes))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    size = tuple(
        max(d, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 9))  # no window steps over the whole input
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    stride = draw(st.tuples(*[small] * axes))
    return Pool(
        draw(st.integers(0, 3)), draw(small), size, kernel, stride, padding, dilation, draw(st.booleans())
    )


@st.composite
def avg_pools(draw):
    pool = draw(pools())
    size = tuple(
        # torch's own for three axes wants inputs as large as the window, whatever the padding
        draw(st.integers(k if len(pool.kernel) == 3 else max(1, k - 2 * p), 11))
        for k, p in zip(pool.kernel, pool.padding, strict=True)
    )
    divisor = draw(st.sampled_from((None, None, 3, -2)))
    return AvgPool(
        pool.n, pool.c, size, pool.kernel, pool.stride, pool.padding, pool.ceil, draw(st.booleans()), divisor
    )


@st.composite
def norms(draw):
    """Enough values a channel that gradients don't cancel."""
    axes = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(8 if axes == 1 else 3, 11)) for _ in range(axes))
    kernel, stride = draw(st.tuples(*[st.integers(1, 3)] * axes)), draw(st.tuples(*[small] * axes))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    square = st.just((2, 2, 0))  # the rows' own
    return Norm(
        draw(st.integers(2, 4)),
        draw(st.integers(1, 20)),
        size,
        draw(st.one_of(st.none(), square, st.just((kernel, stride, padding)))),
        draw(st.sampled_from(("relu", "none"))),
        draw(st.booleans()),
    )


linears = st.builds(
    Linear,
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.integers(1, 70),
    st.integers(0, 70),
    st.booleans(),
)


@st.composite
def chains(draw):
    """Up to three convolutions, then up to two linear layers."""
    n, c, size, made = draw(st.integers(0, 3)), draw(small), (draw(small), draw(small)), []
    for _ in range(draw(st.integers(0, 3))):
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if c % g == 0]))
        kernel, dilation = draw(st.tuples(small, small)), draw(st.tuples(*[st.integers(1, 2)] * 2))
        needed = [max(0, d * (k - 1) + 1 - s) for k, d, s in zip(kernel, dilation, size, strict=True)]
        padding = (
            *(more + draw(st.integers(0, 2)) for more in needed),
            *draw(st.tuples(*[st.integers(0, 2)] * 2)),
        )
        pool = draw(st.one_of(st.none(), st.just((2, 2, 0)), st.tuples(small, small, st.integers(0, 2))))
        conv = Conv(
            n,
            c,
            groups * draw(small),
            size,
            kernel,
            draw(st.tuples(small, small)),
            padding,
            dilation,
            groups,
            pool=pool,
        )
        made.append(conv)
        _, c, *size = conv.pooled_size
        size = tuple(size)
    linears = tuple(draw(st.lists(st.integers(1, 40), min_size=0 if made else 1, max_size=2)))
    features = draw(st.integers(1, 70))
    return Chain(tuple(made), linears, n, features, draw(st.booleans()), draw(st.booleans()))


STRATEGIES = {
    "conv": convs(),
    "conv_act_pool": convs(),
    "max_pool": pools(),
    "avg_pool": avg_pools(),
    "norm_act_pool": norms(),
    "linear": linears,
    "linear_act": linears,
    "chain": chains(),
}


def fuzz(table, backend, data):
    op, pass_ = table
    dtypes = list(DTYPES.values())
    if op == "norm_act_pool":  # whose float64 has no finer sums: a rest of few terms breaks the rule by luck
        dtypes.remove(torch.float64)
    numbers = Numbers(
        "whole",
        data.draw(st.sampled_from(dtypes)),
        data.draw(st.sampled_from(list(LAYOUTS))),
        backend.device,
    )
    case = data.draw(STRATEGIES[op])
    names = [row["name"] for row in ROWS if (row["op"], row["pass_"]) == table and backend.runs(row)]
    if backend.emulator:
        backend.emulator.order = data.draw(st.sampled_from(simt.ORDERS))
    else:
        names.append("")
    each = PROBLEMS[op, pass_](case, numbers)
    for name in names:
        try:
            assert not list(each.wrong(attempt(name, each), numbers)), name
        except Rejected as reason:
            assert re.fullmatch("[a-z].*[^.]", str(reason))


FUZZ = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("table", PROBLEMS, ids="_".join)
@settings(max_examples=40, **FUZZ)
@given(data=st.data())
def test_any_shape(table, backend, data):
    fuzz(table, backend, data)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("table", PROBLEMS, ids="_".join)
@settings(max_examples=1000, **FUZZ)
@given(data=st.data())
def test_any_shape_at_length(table, backend, data):
    fuzz(table, backend, data)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["emulator"], indirect=True)
@pytest.mark.parametrize("table", PROBLEMS, ids="_".join)
@settings(max_examples=100, **FUZZ)
@given(data=st.data())
def test_any_shape_on_the_emulator_at_length(table, backend, data):
    fuzz(table, backend, data)


# --- the same bits ------------------------------------------------------------------------------------------

# Enough work for each to be shared out among threads.
SHARED = {
    "conv": [
        Conv(4, 16, 24, (21, 20), 3, padding=1, pool=(3, 2, 1)),
        Conv(2, 96, 96, (28, 29), 3, padding=1, groups=96),
    ],
    "max_pool": [Pool(4, 24, (41, 40), 3, 2, 1)],
    "avg_pool": [AvgPool(4, 24, (41, 40), 3, 2, 1)],
    "norm_act_pool": [
        Norm(4, 24, (41, 40)),
        Norm(8, 3, (40, 41)),
        Norm(4, 24, (41, 40), (3, 2, 1)),
        Norm(8, 3, (40, 41), None),
    ],
    "linear": [Linear((150,), 130, 400), Linear((2000,), 16, 24)],
}
SHARED["conv_act_pool"], SHARED["linear_act"] = SHARED["conv"], SHARED["linear"]
SHARED["chain"] = [Chain.of(150, 1, (20, 20), [(6, 5, POOL), (8, 3, {"padding": 1, **POOL})], (30, 9))]


# Less, with enough of it to be summed in slices.
SHARED_ON_EMULATOR = {
    "conv": [
        SMALL["conv"],
        Conv(5, 2, 3, (13, 12), 3, pool=(3, 1, 1)),
        Conv(1101, 1, 1, (2, 2), 3, padding=1),
        Conv(1, 16, 16, (4, 3), 3, padding=1),
    ],
    "max_pool": [SMALL["max_pool"]],
    "avg_pool": [SMALL["avg_pool"]],
    "norm_act_pool": [SMALL["norm_act_pool"], Norm(9, 2, (8, 8), None)],
    "linear": [SMALL["linear"], Linear((520,), 8, 9), Linear((520,), 24, 8)],
}
SHARED_ON_EMULATOR["conv_act_pool"] = SHARED_ON_EMULATOR["conv"]
SHARED_ON_EMULATOR["linear_act"] = SHARED_ON_EMULATOR["linear"]
SHARED_ON_EMULATOR["chain"] = [SMALL["chain"]]


def repetitions(backend, threads):
    """Sets up a run each: on 1, 2 and 4 threads of a CPU, in each order of an emulator, or just again."""
    for each in {"cpu": (1, 2, 4, 4), "gpu": range(5)}.get(backend.name, simt.ORDERS):
        if backend.emulator:
            backend.emulator.order = each
        elif backend.name == "cpu":
            threads(each)
        yield


@pytest.mark.parametrize(
    ("row", "backend"), [each for row in ROWS for each in on_backends(row)], indirect=["backend"]
)
def test_same_bits(row, backend, threads):
    accepted, reasons = 0, set()
    cases, dtypes = SHARED, (torch.float32, torch.float64, torch.bfloat16)
    if backend.emulator:
        has_float32 = "float32" in row["dtypes"]
        cases, dtypes = SHARED_ON_EMULATOR, (torch.float32 if has_float32 else torch.bfloat16,)
    for dtype, layout, case in itertools.product(dtypes, ("contiguous", "channels_last"), cases[row["op"]]):
        each = problem(row["op"], row["pass_"], case, Numbers("normal", dtype, layout, backend.device))
        results = []
        for _ in repetitions(backend, threads):
            try:
                results.append(attempt(row["name"], each))
            except Rejected as reason:
                reasons.add(str(reason))
        for other in results[1:]:
            assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items()), (case, dtype)
        accepted += len(results)
    too_old = [reason for reason in reasons if reason.startswith("needs a ")]
    if not accepted and too_old:
        pytest.skip(f"{row['name']} {too_old[0]}")
    assert accepted, f"no case was accepted: {reasons}"


# --- values that no finite reference shows ------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2.0**100, -(2.0**100)])
@pytest.mark.parametrize(("row", "device"), row_parameters("conv", "fprop") + row_parameters("conv", "dgrad"))
def test_what_is_not_moderate_reaches_only_those_that_see_it(row, device, value):
    x = torch.ones(1, 16, 9, 9)
    x[0, 1, 4, 3] = value
    w = torch.ones(16, 16, 3, 3)
    conv = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    if "fprop" in row:
        operator, arguments, by_torch = ops.conv_fprop, (None,), torch.nn.functional.conv2d
    else:
        operator, arguments, by_torch = ops.conv_dgrad, (x.shape,), torch.nn.functional.conv_transpose2d
    try:
        found = attempt(
            row, Problem(lambda k: operator(x.to(device), w.to(device), *arguments, *conv, k), None)
        )
    except Rejected as reason:
        pytest.skip(f"{row} {reason}")
    expected = by_torch(x, w, padding=1)
    assert torch.equal(found.cpu().nan_to_num(7), expected.nan_to_num(7))


MOST = torch.finfo(torch.float32).max
QUIET = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # a NaN that TF32 has no bits for


@pytest.mark.parametrize("value", [torch.nan, QUIET, torch.inf, -torch.inf, 2.0**100, MOST, -MOST, 2.0**-130])
@pytest.mark.parametrize(
    ("row", "backend"),
    [
        each
        for row in ROWS
        if row["pass_"] == "fprop" and "linear" in row["name"] and "_mma_" in row["name"]
        if "float32" in row["dtypes"]
        for each in on_backends(row)
    ],
    indirect=["backend"],
)
def test_tensor_cores_pass_what_is_not_moderate(row, backend, value):
    """As float32 does: beside weights that TF32 holds and that it rounds, and one that is zero."""
    x = torch.ones(5, 24)
    x[2, 7] = value
    w = torch.tensor([1 / 3, 1, -2, 0])[:, None].expand(4, 24).contiguous()
    inputs = x.to(backend.device), w.to(backend.device)
    if in_tf32(row["name"]):
        x, w = to_tf32(x), to_tf32(w)
    try:
        found = attempt(
            row["name"], Problem(lambda k: problems.ops.linear_act(*inputs, None, "none", k), None)
        )
    except Rejected as reason:
        pytest.skip(f"{row['name']} {reason}")
    torch.testing.assert_close(found.cpu(), F.linear(x, w), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 0), (3, 2, 1)])
@pytest.mark.parametrize(
    ("row", "backend"),
    [
        each
        for row in ROWS
        if (row["op"], row["pass_"]) == ("conv_act_pool", "forward")
        for each in on_backends(row)
    ],
    indirect=["backend"],
)
def test_fused_pool_takes_nan_and_the_first_of_equals(row, backend, kernel, stride, padding):
    x = torch.randint(-2, 3, (2, 1, 9, 12)).float()
    x[0, 0, 2, 5], x[1, 0, 0, 0], x[1, 0, 4, 4] = torch.nan, torch.inf, -torch.inf
    w = torch.zeros(3, 1, 3, 3)
    w[0, 0, 1, 1], w[1, 0, 0, 0], w[2] = 1, -1, 0.25
    pool = ((kernel, kernel), (stride, stride), (padding, padding))

    def run(row):
        conv = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
        inputs = (t.to(backend.device) for t in (x, w))
        return problems.ops.conv_act_pool(*inputs, None, *conv, "relu", *pool, True, row)

    try:
        y, offsets = attempt(row["name"], Problem(run, by_torch=None))
    except Rejected as reason:
        pytest.skip(f"{row['name']} {reason}")
    unpooled = torch.nn.functional.conv2d(x, w, padding=1).relu()
    expected, expected_indices = torch.nn.functional.max_pool2d(unpooled, *pool, return_indices=True)
    assert torch.equal(y.cpu().nan_to_num(7), expected.nan_to_num(7))
    indices = ops.max_pool_indices(offsets.cpu(), unpooled.shape, *pool, (1, 1), False, "")
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    ("row", "backend"),
    [each for row in ROWS if row["op"] == "conv_act_pool" for each in on_backends(row)],
    indirect=["backend"],
)
def test_fused_pool_without_relu(row, backend, padding):
    """Where all are -inf the first cell inside is taken; gradients of values below zero pass."""
    conv, pool = ((1, 1), (1, 1, 1, 1), (1, 1), 1), ((3, 3), (2, 2), (padding, padding))
    x, w = torch.randn(2, 2, 8, 9), torch.randn(3, 2, 3, 3)
    if row["pass_"] == "forward":
        x[0], w = -torch.inf, w.abs()
    else:
        x.requires_grad_(), w.requires_grad_()
    unpooled = F.conv2d(x, w, padding=1)
    y, indices = F.max_pool2d(unpooled, *pool, return_indices=True)
    _, offsets = ops.max_pool(unpooled.detach(), *pool, (1, 1), False, True, "")
    gy = torch.randn_like(y)

    def run(kernel):
        inputs = [t.detach().to(backend.device) for t in (gy, y, offsets, x, w)]
        if row["pass_"] == "forward":
            return problems.ops.conv_act_pool(*inputs[3:], None, *conv, "none", *pool, True, kernel)
        return problems.ops.conv_act_pool_backward(*inputs, *conv, "none", *pool, [True, True, False], kernel)

    try:
        found = attempt(row["name"], Problem(run, by_torch=None))
    except Rejected as reason:
        pytest.skip(f"{row['name']} {reason}")
    if row["pass_"] == "forward":
        torch.testing.assert_close(found[0].cpu(), y)
        found_indices = ops.max_pool_indices(found[1].cpu(), unpooled.shape, *pool, (1, 1), False, "")
        assert torch.equal(found_indices, indices)
    else:
        expected = torch.autograd.grad(y, (x, w), gy)
        for gradient, by_torch in zip(found, expected, strict=False):
            torch.testing.assert_close(gradient.cpu(), by_torch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "backend"),
    [each for row in ROWS if (row["op"], row["pass_"]) == ("chain", "forward") for each in on_backends(row)],
    indirect=["backend"],
)
def test_chain_takes_nan(row, backend):
    """Through ReLU, 2x2 and 3x3/2 pools and a linear layer, image by image."""
    x = torch.randint(-2, 3, (4, 1, 13, 12)).float()
    x[0, 0, 2, 5], x[1, 0, 0, 0], x[2, 0, 4, 4] = torch.nan, torch.inf, -torch.inf
    filters = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1), torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1)
    params = [*filters, torch.ones(3, 18)]
    plan = G.conv_stage(act="relu", bias=False, pool_kernel_size=2)
    plan += G.conv_stage(act="relu", bias=False, groups=2, pool_kernel_size=3, pool_stride=2, pool_padding=1)
    plan += G.linear_stage(bias=False)

    def run(kernel):
        images, *weights = (t.to(backend.device) for t in (x, *params))
        return problems.ops.chain(images, weights, plan, False, kernel)[0]

    try:
        found = attempt(row["name"], Problem(run, by_torch=None))
    except Rejected as reason:
        if not str(reason).startswith("needs a "):
            raise
        pytest.skip(f"{row['name']} {reason}")
    y = F.max_pool2d(F.conv2d(x, filters[0]).relu(), 2)
    y = F.max_pool2d(F.conv2d(y, filters[1], groups=2).relu(), 3, 2, 1)
    expected = F.linear(y.flatten(1), params[2])
    assert expected.isnan().any() and expected.isfinite().any()
    assert torch.equal(found.cpu().nan_to_num(7), expected.nan_to_num(7))


def test_one_stage_keeps_nothing(emulator):
    """Then whichever row has run forward, the composed backward takes it."""
    x, w, gy = torch.randn(5, 7), torch.randn(3, 7), torch.randn(5, 3)
    plan = G.linear_stage(bias=False)
    y, saved = emulator.chain(x, [w], plan, True, "cuda/chain_fused")
    assert saved.numel() == 0
    rows = "cuda/chain_backward_composed,cuda/chain_fused"
    grad_x, (grad_w,) = emulator.chain_backward(gy, y, x, [w], saved, plan, 3, rows)
    torch.testing.assert_close(grad_x, gy @ w)
    torch.testing.assert_close(grad_w, gy.T @ x)


@pytest.mark.parametrize("n", [1, 256, 1024, 4096])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (12, 0)])
def test_lenet_is_fused(n, capability):
    """Forward in one launch, of a cluster for one image where there are clusters; backward in three."""
    plan = G.conv_stage(act="relu", pool_kernel_size=2) * 2 + G.linear_stage(act="relu") * 2
    params = [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]
    question = dict(input=(n, 1, 32, 32), plan=plan + G.linear_stage(), params=params)
    forward, backward = kernels.explain("chain", **question, device="cuda", capability=capability)
    few = n == 1 and capability >= (9, 0)
    assert forward["chosen"] == ("cuda/chain_fused_cluster" if few else "cuda/chain_fused")
    if n < 4096 and capability > (7, 5):  # which has no room for the gradient of the input
        assert backward["chosen"] == "cuda/chain_backward_fused"


@pytest.mark.parametrize(("row", "device"), row_parameters("conv", "fprop"))
def test_float16_overflows_to_infinity(row, device):
    """Sums are kept in float32, so only the result overflows."""
    x = torch.tensor([300.0, 300.0, -300.0, 300.0, 300.0], dtype=torch.float16, device=device).reshape(
        1, 1, 1, 5
    )
    w = torch.full((1, 1, 1, 3), 200.0, dtype=torch.float16, device=device)
    with forced(row):
        output = fastconv.functional.conv2d(x, w)
    assert output.flatten().tolist() == [60000, 60000, 60000]
    with forced(row):
        assert fastconv.functional.conv2d(x[..., :2], w[..., :2]).item() == torch.inf


@pytest.mark.parametrize("fused", [False, True])
def test_nan_passes_the_relu(fused, device):
    x = torch.tensor([[torch.nan, 1.0], [-1.0, 2.0]], device=device)
    w = torch.eye(2, device=device)
    if fused:
        output = fastconv.functional.linear_relu(x, w)
    else:
        output = fastconv.functional.conv2d_relu_max_pool2d(x[None, None], w[:1, :1, None, None])[0, 0]
    assert output[0].isnan()[0] and output[1].tolist() == [0, 2]
