"""Device functions: random numbers, scores and narrow floats as `distributions` and torch define them, bit for bit.

Only correctly rounded additions, multiplications, divisions and roots and integer operations are used, in the order of
the definitions, and kernels are launched with `EXACT`, so that no product and sum are fused into one rounding.
bfloat16 is read and written as its bits, which any device can do and Triton's interpreter does exactly.
"""

import math

import triton
import triton.language as tl

from ..distributions import _COSINE, _LOGARITHM, _SINE, _SQRT_HALF_BITS

EXACT = {"enable_fp_fusion": False}
"""Options of every launch."""

SINE_0, SINE_1, SINE_2, SINE_3, SINE_4 = (tl.constexpr(value) for value in _SINE)
COSINE_0, COSINE_1, COSINE_2, COSINE_3, COSINE_4, COSINE_5 = (tl.constexpr(value) for value in _COSINE)
LOGARITHM_0, LOGARITHM_1, LOGARITHM_2, LOGARITHM_3 = (tl.constexpr(value) for value in _LOGARITHM)
SQRT_HALF_BITS = tl.constexpr(_SQRT_HALF_BITS)
LOG_2 = tl.constexpr(math.log(2))
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
SQRT_2 = tl.constexpr(math.sqrt(2.0))
SQRT_HALF_PI = tl.constexpr(math.sqrt(math.pi / 2))
HALF_TURN = tl.constexpr(math.pi * 2.0**-31)
NO_RADIUS = tl.constexpr(0x7FFFFF)
QUARTER_TURN = tl.constexpr(2**30 - 32)


@triton.jit
def words(first, draw, site_word, step, seed, blocks: tl.constexpr):
    """The words of Philox blocks ``first … first + blocks - 1`` of a draw, four uint32 vectors, one a lane."""
    block = (first + tl.arange(0, blocks)).to(tl.uint32)
    zero = tl.zeros_like(block)
    return tl.philox(seed, block, zero + draw.to(tl.uint32), zero + site_word.to(tl.uint32), zero + step.to(tl.uint32))


@triton.jit
def in_order(lane0, lane1, lane2, lane3):
    """Element ``4 b + lane`` of one vector."""
    return tl.interleave(tl.interleave(lane0, lane2), tl.interleave(lane1, lane3))


@triton.jit
def minus_log(lane):
    """`distributions._minus_log`; the lane is int32."""
    number = ((lane >> 8) + 0x800001).to(tl.float32) * (2.0**-24)
    bits = number.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    number = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    quotient = tl.div_rn(number - 1.0, number + 1.0)
    square = quotient * quotient
    value = ((square * LOGARITHM_3 + LOGARITHM_2) * square + LOGARITHM_1) * square + LOGARITHM_0
    return (value * quotient + exponent.to(tl.float32) * LOG_2) * -1.0


@triton.jit
def with_sign_of(magnitude, word):
    """`magnitude`, its sign flipped where the top bit of the int32 `word` is set."""
    bits = magnitude.to(tl.int32, bitcast=True) ^ ((word >> 31) << 31)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(lane_a, lane_b):
    """`distributions._box_muller`: two normal numbers of two int32 lanes."""
    radius = with_sign_of(tl.sqrt_rn(minus_log(lane_a) * 2.0), lane_b)
    angle = ((lane_b << 1) >> 1).to(tl.float32) * HALF_TURN
    square = angle * angle
    cosine = ((square * COSINE_5 + COSINE_4) * square + COSINE_3) * square + COSINE_2
    cosine = (cosine * square + COSINE_1) * square + COSINE_0
    sine = (((square * SINE_4 + SINE_3) * square + SINE_2) * square + SINE_1) * square + SINE_0
    return cosine * radius, sine * angle * radius


@triton.jit
def laplace(lane):
    return with_sign_of(minus_log(lane) * SQRT_HALF, lane << 31)


@triton.jit
def signs_of_box_muller(lane_a, lane_b):
    """Of both normal numbers the signs alone: the radius is zero for one lane, the cosine of an angle that is rounded
    to a quarter turn comes out below zero, and that is all there is to tell."""
    radius = tl.where((lane_a >> 8) == NO_RADIUS, 0, (lane_b >> 31) * 2 + 1)
    half = (lane_b << 1) >> 1
    cosine = tl.where((half >= QUARTER_TURN) | (half <= -QUARTER_TURN), -radius, radius)
    return cosine.to(tl.float32), (radius * ((half > 0).to(tl.int32) - (half < 0).to(tl.int32))).to(tl.float32)


@triton.jit
def sign_of_laplace(lane):
    return tl.where((lane >> 8) == NO_RADIUS, 0, 1 - (lane & 1) * 2).to(tl.float32)


@triton.constexpr_function
def by_sign(noise, score, dtype):
    """Whether the score of noise in `dtype` asks for its sign alone. In float16 the smallest numbers are zero."""
    return (noise == "laplace" or score == "sign") and dtype != "float16"


@triton.jit
def block_of(lane0, lane1, lane2, lane3, noise: tl.constexpr, signs: tl.constexpr):
    """The four numbers of Philox blocks, "gaussian" or "laplace", or only their signs."""
    lane0, lane1 = lane0.to(tl.int32, bitcast=True), lane1.to(tl.int32, bitcast=True)
    lane2, lane3 = lane2.to(tl.int32, bitcast=True), lane3.to(tl.int32, bitcast=True)
    if signs and noise == "gaussian":
        value0, value1 = signs_of_box_muller(lane0, lane1)
        value2, value3 = signs_of_box_muller(lane2, lane3)
    elif signs:
        value0, value1 = sign_of_laplace(lane0), sign_of_laplace(lane1)
        value2, value3 = sign_of_laplace(lane2), sign_of_laplace(lane3)
    elif noise == "gaussian":
        value0, value1 = box_muller(lane0, lane1)
        value2, value3 = box_muller(lane2, lane3)
    else:
        value0, value1, value2, value3 = laplace(lane0), laplace(lane1), laplace(lane2), laplace(lane3)
    return value0, value1, value2, value3


@triton.jit
def numbers(
    tile, draw, site_word, step, seed, noise: tl.constexpr, elements: tl.constexpr, signs: tl.constexpr = False
):
    """Elements ``tile * elements …`` of a draw as float32 (elements,): a noise, or its signs, or "uniform" numbers.

    `elements` is a power of two from 128 on.
    """
    if noise == "rademacher":
        lane0, lane1, lane2, lane3 = words(tile * (elements // 128), draw, site_word, step, seed, elements // 128)
        bits = in_order(lane0, lane1, lane2, lane3)[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]
        return tl.reshape((bits & 1).to(tl.int32) * 2 - 1, [elements]).to(tl.float32)
    lane0, lane1, lane2, lane3 = words(tile * (elements // 4), draw, site_word, step, seed, elements // 4)
    if noise == "uniform":
        return uniform(in_order(lane0, lane1, lane2, lane3))
    value0, value1, value2, value3 = block_of(lane0, lane1, lane2, lane3, noise, signs)
    return in_order(value0, value1, value2, value3)


@triton.jit
def lanes_at(word, draw, site_word, step, seed):
    """The Philox blocks that hold the 32-bit words number `word` of draws, four uint32; tensors of one shape."""
    block = (word >> 2).to(tl.uint32)
    zero = tl.zeros_like(block)
    return tl.philox(seed, block, zero + draw.to(tl.uint32), zero + site_word.to(tl.uint32), zero + step.to(tl.uint32))


@triton.jit
def lane_of(word, lane0, lane1, lane2, lane3):
    """Of four values a block the one that belongs to a word."""
    lane = word & 3
    return tl.where(lane < 2, tl.where(lane == 0, lane0, lane1), tl.where(lane == 2, lane2, lane3))


@triton.jit
def word_at(word, draw, site_word, step, seed):
    """Words of draws, wherever they are, uint32: a block is made for each."""
    lane0, lane1, lane2, lane3 = lanes_at(word, draw, site_word, step, seed)
    return lane_of(word, lane0, lane1, lane2, lane3)


@triton.jit
def uniform(word):
    """uint32 as a number in [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def sign(value):
    return (value > 0).to(tl.float32) - (value < 0).to(tl.float32)


@triton.jit
def scored(value, noise: tl.constexpr, score: tl.constexpr, dtype: tl.constexpr):
    """The score of noise in `dtype` (`distributions.Distribution.scores`), in the same dtype."""
    if noise == "laplace":
        value = rounded(sign(value) * SQRT_2, dtype)
    elif noise == "gaussian" and score == "sign":
        value = rounded(sign(value) * SQRT_HALF_PI, dtype)
    return value


@triton.jit
def bfloat16_bits(value):
    """float32 rounded to bfloat16, to nearest and even, as int32 with the bits on top."""
    bits = value.to(tl.uint32, bitcast=True)
    up = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False)
    return tl.where(value != value, 0x7FC00000, (up & 0xFFFF0000).to(tl.int32, bitcast=True))


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 rounded to `dtype`, still as float32."""
    if dtype == "bfloat16":
        value = bfloat16_bits(value).to(tl.float32, bitcast=True)
    elif dtype == "float16":
        value = value.to(tl.float16).to(tl.float32)
    return value


@triton.jit
def read(pointer, inside, dtype: tl.constexpr):
    """Values of `dtype` as float32; bfloat16 lies there as int16."""
    if dtype == "bfloat16":
        value = (tl.load(pointer, inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(pointer, inside, other=0).to(tl.float32)
    return value


@triton.jit
def write(pointer, value, inside, dtype: tl.constexpr):
    if dtype == "bfloat16":
        tl.store(pointer, (bfloat16_bits(value) >> 16).to(tl.int16), inside)
    elif dtype == "float16":
        tl.store(pointer, value.to(tl.float16), inside)
    else:
        tl.store(pointer, value, inside)
