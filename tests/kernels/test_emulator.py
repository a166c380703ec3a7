"""The emulator's checks, on kernels that are right and on the same kernels with one error each
(tests/fixtures/emulator/checks.cu); and its arithmetic, shuffles and votes against models of them."""

import re

import pytest
import torch
from emulated import call, library, marked

# kernel: what its message must say, in the checked build; block, and other arguments of the call
CHECKS = {
    "tensor_end": (r"reads 4 bytes right past the end of tensor 1 of the call, an input \(256 bytes\)", {}),
    "tensor_begin": (r"reads 4 bytes [48] bytes before tensor 1 of the call", {}),
    "shared_end": (r"writes 4 bytes right past the end of shared array 'first' \(256 bytes\)", {}),
    "dynamic_end": (r"right past the end of dynamic shared memory \(256 bytes\)", {"shared": 256}),
    "null_pointer": (r"reads 4 bytes at a null pointer", {}),
    "read_only": (r"writes 4 bytes at byte \d+ of tensor 1 of the call, an input .* which is read-only", {}),
    "misaligned": (r"misaligned: reads 16 bytes at an address that is 4 past a multiple of 16", {}),
    "global_write": (r"writes 4 bytes outside of every tensor", {}),
    "shared_undefined": (r"reads 4 bytes at byte 20 of shared array 's' .* uninitialized", {}),
    "output_undefined": (r"reads 4 bytes at byte \d+ of tensor 2 of the call, an output .* uninitialized", {}),
    "in_flight": (r"reads 4 bytes at byte \d+ of shared array 's' .* asynchronous copy that was not waited for", {}),
    "one_group_early": (r"at byte \d+ of shared array 's' .* asynchronous copy that was not waited for", {}),
    "wait_after_barrier": (r"asynchronous copy that was not waited for|race: reads", {}),
    "no_barrier": (r"race: reads byte|a barrier is missing", {}),
    "read_then_write": (
        r"race: (writes|reads) byte 0 of shared array 's' .* (read|wrote) at checks.cu:\d+ with no",
        {},
    ),
    "shuffle_is_no_barrier": (r"race: reads byte \d+ of shared array 's'", {"block": 32}),
    "blocks": (r"race: writes byte \d+ of tensor 2 .* \(blocks are not ordered\)", {"grid": 2, "block": 32}),
    "plain_add": (r"race: .* of tensor 3 of the call, changed in place \(4 bytes\)", {}),
    "read_of_atomic": (r"race: (reads byte 0 of .* updated|updates) atomically .* with no barrier in between", {}),
    "named_barrier": (r"race: reads byte|a barrier is missing", {"block": 96}),
    "bytes_of_a_word": (r"race: writes byte \d+ of shared array 's'", {}),
}
# what the plain build finds as well
CONTROL = {
    "deadlock": (r"deadlock: 33 threads wait at a block barrier at .* 31 threads wait at a warp collective at", {}),
    "divergent_barrier": (r"divergent barrier: thread .* is at checks.cu:\d+, thread .* at checks.cu:\d+", {}),
    "lane_exited": (r"names a lane that has exited", {}),
    "mask_without_caller": (r"mask leaves out the lane that calls it", {}),
    "source_outside": (r"a shuffle from a lane outside of its mask", {"block": 32}),
    "different_collectives": (r"lanes of one warp meet in different collectives", {"block": 32}),
}


def run(kernel, options, bug, build="checked"):
    x, y, sum_ = torch.arange(64.0), torch.empty(64), torch.zeros(1, dtype=torch.int32)
    return call(kernel, ("in", x), ("out", y), ("inout", sum_), bug=bug, build=build, **options)


@pytest.mark.parametrize("order", [0, 1, 5], ids=("as numbered", "reversed", "shuffled"))
@pytest.mark.parametrize("kernel", CHECKS)
def test_planted_error_is_found_where_it_is(kernel, order):
    words, options = CHECKS[kernel]
    library("checked").set_order(order)
    try:
        run(kernel, options, "")
        with pytest.raises(RuntimeError) as error:
            run(kernel, options, "planted")
    finally:
        library("checked").set_order(0)
    message = str(error.value)
    assert re.search(words, message), message
    line = int(re.match(r"checks.cu:(\d+): ", message)[1])
    assert line in marked(kernel), message
    assert re.search(r"by thread \(\d+, 0, 0\) of block \(\d, 0, 0\)$", message)


@pytest.mark.parametrize("build", ["emulated", "checked"])
@pytest.mark.parametrize("kernel", CONTROL)
def test_control_flow_faults(kernel, build):
    words, options = CONTROL[kernel]
    run(kernel, options, "", build)
    with pytest.raises(RuntimeError, match=words) as error:
        run(kernel, options, "planted", build)
    assert int(re.search(r"checks.cu:(\d+)", str(error.value))[1]) in marked(kernel)


@pytest.mark.parametrize(
    ("grid", "block", "shared"), [(1, 1025, 0), (1, 0, 0), (0, 32, 0), (1, 32, 227 * 1024 + 1), (2**31, 1, 0)]
)
def test_launch_that_no_gpu_accepts(grid, block, shared):
    with pytest.raises(RuntimeError, match="a launch that no GPU accepts"):
        call("tensor_end", ("in", torch.ones(64)), ("out", torch.ones(64)), grid=grid, block=block, shared=shared)


def test_permissions_end_with_the_call():
    x, y = torch.arange(64.0), torch.empty(64)
    call("tensor_end", ("in", x), ("out", y))
    assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match=r"tensor 2 of the call, an input .*read-only"):
        call("tensor_end", ("in", x), ("in", y))


def test_overlapping_tensors_have_the_rights_of_both():
    x = torch.arange(64.0)
    call("tensor_end", ("in", x), ("inout", x))
    call("tensor_end", ("in", x[:64]), ("out", x))
    y = torch.zeros(96)
    with pytest.raises(RuntimeError, match="read-only"):  # its first half is an input only
        call("tensor_end", ("in", y[:64]), ("in", y[16:80]))


def test_a_fault_leaves_the_emulator_usable():
    with pytest.raises(RuntimeError):
        run("in_flight", {}, "planted")
    run("in_flight", {}, "")
    run("deadlock", {}, "")


# --- statistics


def counted(kernel, **options):
    module = library("checked")
    module.set_counting(True)
    try:
        x, y = torch.arange(64.0), torch.empty(64)
        call(kernel, ("in", x), ("out", y), block=options.pop("block", 32), **options)
    finally:
        module.set_counting(False)
    return {(r["line"], r["kind"]): r for r in module.statistics() if r["file"].endswith("checks.cu")}


def line(name):
    return marked(name)[0]


def test_sectors_of_a_strided_load():
    rows = counted("strided", block=16)
    load, store = rows[line("strided"), "global load"], rows[line("strided"), "global store"]
    assert (load["requests"], load["ideal"], load["width"]) == (1, 2, 4)  # 16 lanes of 4 bytes: two sectors would do
    assert load["units"] == 8  # 16 lanes, 16 bytes apart
    assert store["units"] == store["ideal"] == 2


def test_bank_conflicts_of_a_column():
    rows = counted("column")
    bad, good = rows[line("column"), "shared store"], rows[line("padded column"), "shared store"]
    assert (bad["requests"], bad["units"], bad["ideal"]) == (1, 32, 1)
    assert (good["requests"], good["units"], good["ideal"]) == (1, 1, 1)


def test_wide_accesses_are_served_a_quarter_warp_at_a_time():
    rows = counted("wide")
    store, same = rows[line("wide"), "shared store"], rows[line("wide same"), "shared load"]
    apart = rows[line("wide apart"), "shared load"]
    assert (store["requests"], store["units"], store["ideal"], store["width"]) == (1, 4, 4, 16)
    assert (same["units"], same["ideal"]) == (4, 4)  # one address for eight lanes is no conflict
    assert (apart["units"], apart["ideal"]) == (32, 4)  # eight rows of 128 bytes, the same four banks


def test_instructions_are_counted_by_warp():
    rows = counted("deadlock", block=64)
    assert {kind: r["requests"] for (_, kind), r in rows.items() if not r["ideal"]} == {"__syncthreads": 2}


# --- arithmetic

PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
KINDS = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def bits(t):
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def same_numbers(a, b):
    """Bit for bit, but any NaN is as good as another."""
    return bool(((bits(a) == bits(b)) | (a.float().isnan() & b.float().isnan())).all())


def convert(kernel, x, dtype, number):
    out = torch.empty(x.numel(), dtype=dtype)
    call(kernel, ("in", x), ("out", out), ("in", torch.tensor([x.numel()])), number=number, build="emulated")
    return out


@pytest.mark.parametrize("kind", range(4), ids=("bf16", "f16", "e4m3", "e5m2"))
def test_every_number_widens_as_in_torch(kind):
    x = PATTERNS.view(KINDS[kind]) if kind < 2 else torch.arange(256, dtype=torch.uint8).view(KINDS[kind])
    assert same_numbers(convert("to_wide", x, torch.float32, kind), x.float())


@pytest.mark.parametrize("kind", range(4), ids=("bf16", "f16", "e4m3", "e5m2"))
def test_rounding_is_torchs(kind):
    """All bf16 and f16 numbers, and for each pattern of 16 bits the fp32 numbers around the half way to the next."""
    high = PATTERNS.to(torch.int64) << 16
    near = [high | low for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    near = [(t - (1 << 32) * (t >> 31)).to(torch.int32).view(torch.float32) for t in near]
    half = PATTERNS.view(torch.float16).float()
    ties = bits(half) + torch.tensor([[-1], [0], [1], [0xFFF], [0x1000], [0x1001]])  # steps of f16 are 0x2000
    x = torch.cat([half, *near, ties.to(torch.int32).view(torch.float32).flatten()]).contiguous()
    want = x.to(KINDS[kind])
    if kind == 2:  # torch saturates e4m3, which has no infinity, and it alone
        assert same_numbers(convert("to_narrow", x, KINDS[2], 4), want)
        want = torch.where(x.abs() > 464, torch.nan, x).to(KINDS[2])  # 464: half way to what would be 480
    if kind == 3:
        largest = torch.finfo(KINDS[3]).max
        assert same_numbers(convert("to_narrow", x, KINDS[3], 5), x.clamp(-largest, largest).to(KINDS[3]))
    assert same_numbers(convert("to_narrow", x, KINDS[kind], kind), want)


# --- warps: models from the CUDA C++ Programming Guide, "Warp Shuffle Functions" and "Warp Vote Functions"


@pytest.mark.parametrize("width", [32, 16, 8, 4, 2, 1])
@pytest.mark.parametrize("by", [0, 1, 2, 3, 5, 8, 17, 31])
def test_shuffles(width, by):
    value = torch.arange(100, 132, dtype=torch.int32)
    got = torch.empty(5, 32, dtype=torch.int32)
    args = torch.full((32,), by, dtype=torch.int32)
    call("shuffles", ("in", value), ("in", args), ("out", got), number=width, block=32, build="emulated")
    for lane in range(32):
        first = lane // width * width
        sources = [
            first + by % width,
            lane - by if lane - by >= first else lane,
            lane + by if lane + by < first + width else lane,
            lane ^ by,  # earlier groups may be read, later ones give the lane its own value
            lane ^ 1,
        ]
        for k in (3, 4):
            if sources[k] >= first + width:
                sources[k] = lane
        want = [100 + s for s in sources[:4]] + [2 * (100 + sources[4]) + 1]
        assert got[:, lane].tolist() == want, (lane, width, by)


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x5555AAAA, 0x80000001, 1 << 13])
def test_votes(mask):
    lanes = [i for i in range(32) if mask >> i & 1]
    for seed in range(3):
        values = torch.randint(0, 2 + seed, (32,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        if seed == 2:
            values[lanes] = 3
        got = torch.full((4, 32), -7, dtype=torch.int32)
        call("votes", ("in", values), None, ("inout", got), number=mask, block=32, build="emulated")
        ballot = sum(1 << i for i in lanes if values[i])
        want = [ballot - (1 << 32) * (ballot >> 31), int(ballot > 0), int(ballot == mask), int(values[lanes].sum())]
        for i in range(32):
            assert got[:, i].tolist() == (want if i in lanes else [-7] * 4)


def test_atomics():
    old, x = torch.empty(64, dtype=torch.int32), torch.tensor([0, 7, 0, -1, 0], dtype=torch.int32)
    call("atomics", None, ("out", old), ("inout", x))
    assert x.tolist() == [64 * 63 // 2, 63, 2**31 - 1, 63, 64]
    assert old.tolist() == [i * (i - 1) // 2 for i in range(64)]
